"""SFT, reward model and ILQL as their commands run them, on as many ranks as there are; test_zero_stages.py compares.

`ranks_methods.py ROOT`, under `accelerate launch` with DeepSpeed's settings. ROOT holds a run directory for each mode;
each rank writes there what these do not show.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from helpers_ppo import HashScorer
from helpers_process import fresh_accelerate
from torch import Tensor, nn

os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed looks for others

from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param

from pipeline.training import (
    distributed,
    ilql,
    ilql_assemble,
    ilql_evaluation,
    reward_model,
    sft,
    sharding,
    supervised,
)
from pipeline.training.batches import split_by_tokens
from pipeline.training.ilql_heads import Heads, TargetHeads
from pipeline.training.models import load_causal_lm
from pipeline.training.ranks import make_accelerator
from pipeline.training.reward_source import RewardSource

MAINS: dict[str, Callable[[list[str]], int]] = {
    "sft": sft.main, "reward_model": reward_model.main, "ilql": ilql.main,
}  # fmt: skip
FP16 = {"initial_scale_power": 24, "hysteresis": 1, "loss_scale_window": 1000}
PERSISTENT = 100
"""Weights that ZeRO-3 keeps whole between forwards: here the biases, as it is with real models."""


def enter(mode: str) -> None:
    """This process is about to train in `mode`: zero2, zero3, or one of them with a precision behind a dash."""
    fresh_accelerate()
    stage, _, precision = mode.partition("-")
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = stage[-1]
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision or "no"


def configure(accelerator: Accelerator, micro_batch_size: int, max_grad_norm: float) -> None:
    """As the project does it, but for models that are smaller than what ZeRO-3 would shard, and for a first loss scale
    that overflows."""
    distributed.configure_deepspeed(accelerator, micro_batch_size, max_grad_norm)
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = PERSISTENT
    if accelerator.mixed_precision == "fp16":
        settings["fp16"] = {"enabled": True, **FP16}


def command(root: Path, mode: str, method: str, out: str) -> int:
    enter(mode)
    return MAINS[method](["--run", str(root / mode), "--out", str(root / mode / out)])


def cut(rows: Sequence[Any], max_tokens: int) -> list[list[Any]]:
    """Held-out rows in more forwards on one rank than on the other, as rows of unlike lengths are."""
    return split_by_tokens(rows, max_tokens if os.environ["RANK"] == "0" else 2 * max_tokens)


class Sum(nn.Module):
    """The sum of w * x: w's gradient is x."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1, bias=False)
        nn.init.constant_(self.layer.weight, 1.0 + 2**-12)  # bf16 takes it for 1

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.layer(x).sum()
        return total


def added(mode: str, gradients: list[float]) -> list[float]:
    """The weights' masters before and after a step of SGD, with a rate of 1, on the sum of these gradients."""
    enter(mode)
    accelerator = make_accelerator(1)
    configure(accelerator, 1, 0.0)
    module = Sum()
    wrapped, _ = sharding.prepare(accelerator, module, torch.optim.SGD(module.parameters(), lr=1.0))
    masters = [master(module.layer.weight)]
    for place, gradient in enumerate(gradients, 1):
        accelerator.sync_gradients = place == len(gradients)
        x = torch.full((1, 6), gradient, dtype=torch.bfloat16, device=accelerator.device)
        distributed.backward(accelerator, wrapped(x))
    return [*masters, master(module.layer.weight)]


def master(weight: nn.Parameter) -> float:
    value: Tensor = safe_get_full_fp32_param(weight)
    assert len(value.unique()) == 1
    return float(value.flatten()[0])


class Followed(nn.Module):
    """Trained heads and their targets; all of their weights are small enough to stay whole between forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = Heads(4, 12, True, seed=0)
        self.targets = TargetHeads(self.heads)

    def forward(self, x: Tensor, actions: Tensor) -> Tensor:
        gap = self.heads.taken(x, actions) - self.targets.smallest_taken(x, actions)
        return (gap - 1.0).square().sum() + self.heads.values(x).sum()


def followed(alpha: float) -> bool:
    """Whether the next forward behind a synchronisation in bf16 sees exactly what float32 makes of the masters."""
    enter("zero3-bf16")
    accelerator = make_accelerator(1)
    configure(accelerator, 1, 1.0)
    module = Followed()
    before = {name: weight.clone() for name, weight in module.targets.named_parameters()}
    optimizer = torch.optim.AdamW(module.heads.parameters(), lr=0.1)
    wrapped, _ = sharding.prepare(accelerator, module, optimizer)
    accelerator.sync_gradients = True
    distributed.backward(accelerator, wrapped(torch.ones(2, 4, dtype=torch.bfloat16), torch.tensor([3, 5])))
    trained = {name: safe_get_full_fp32_param(weight) for name, weight in module.heads.named_parameters()}
    module.targets.sync(module.heads, alpha)
    with distributed.whole_weights(accelerator, module.targets)():
        return all(
            torch.equal(weight, before[name].lerp(trained[name], alpha)) and not torch.equal(weight, before[name])
            for name, weight in module.targets.named_parameters()
        )


def spread_model(folder: Path) -> dict[str, Any]:
    """How many numbers this rank holds of a model that rank 0 read, and its weights as all ranks see them."""
    enter("zero3")
    accelerator = make_accelerator(1)
    configure(accelerator, 1, 1.0)
    model = load_causal_lm(folder, torch.float32, weights=sharding.loads_weights(accelerator))
    held = sum(weight.untyped_storage().nbytes() for weight in model.parameters())
    sharding.spread(accelerator, model)
    with distributed.whole_weights(accelerator, model)():
        weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    torch.save(weights, folder.with_name(f"weights-{accelerator.process_index}.pt"))
    return {"held": held, "shares": sum(weight.ds_tensor.numel() for weight in model.parameters())}


def main() -> None:
    root = Path(sys.argv[1])
    supervised.configure_deepspeed = ilql_assemble.configure_deepspeed = configure  # type: ignore[attr-defined]
    ilql_evaluation.split_by_tokens = cut  # type: ignore[attr-defined]
    RewardSource.connect = lambda self: HashScorer()  # type: ignore[assignment,method-assign,return-value]
    results: dict[str, Any] = {"spread": spread_model(root / "zero3/stages/sft/out/model")}
    for mode in ("zero2-bf16", "zero3-bf16"):
        results[mode] = added(mode, [256.0, 1.0, 1.0, 1.0, 1.0])
    results["followed"] = followed(alpha=1e-4)
    for mode in ("zero2", "zero3"):
        for method in MAINS:
            assert command(root, mode, method, method) == 0
    assert command(root, "zero3-bf16", "ilql", "whole") == 0
    if os.environ["RANK"] == "0":
        [last] = (root / "zero3-bf16/checkpoints").glob("*/step-00000004")
        shutil.rmtree(last)
    torch.distributed.barrier()
    assert command(root, "zero3-bf16", "ilql", "resumed") == 0
    of_device = get_accelerator()
    of_device.is_fp16_supported = lambda: True  # torch's CPU kernels do compute in it
    assert command(root, "zero2-fp16", "sft", "sft") == 0
    (root / f"results-{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
