"""One training on as many ranks as there are, over the same rollouts; test_distributed_training.py compares them.

`ranks_training.py RUN OUT`, under `accelerate launch` with DeepSpeed's settings: rank 0 writes the results of ZeRO-3,
of ZeRO-2 and of DDP to OUT.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from helpers_process import fresh_accelerate

from pipeline.config.load import read_config
from pipeline.data.tokens import load_tokenizer
from pipeline.run.directory import RunDir
from pipeline.training.assemble import load_policy, prepare, save_policy
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.critic import load_critic
from pipeline.training.decode import Response, decode
from pipeline.training.distributed import shards_weights, uses_deepspeed, whole_weights
from pipeline.training.ranks import Ranks, make_accelerator
from pipeline.training.split import Split
from pipeline.training.stopping import StopSequences
from pipeline.training.update import experience, reference_function, targets_of
from pipeline.training.updater import Updater

PROMPTS = [[5, 9, 200], [7], [11, 12, 13, 14, 15, 16, 17], [40, 41], [99, 98, 97, 96], [3, 4], [8, 8, 8], [60]]
NAMES = ("losses/policy_loss", "losses/value_loss", "policy/approx_kl", "values/mean", "grad_norm")


def sample(split: Split, config: Any, tokenizer: Any) -> list[Response]:
    stops = StopSequences(tokenizer, [])
    return decode(split, PROMPTS, config.generate, stops, 77, torch.Generator().manual_seed(0))


def one(mode: str, run: RunDir) -> dict[str, Any]:
    """Two phases, a checkpoint, a third phase, and the third again from the checkpoint: the metrics of each, the
    folder of the saved model, what it then samples, and how many weights this rank holds outside of a forward."""
    fresh_accelerate()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(mode.startswith("zero")).lower()
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = mode[-1]
    config = read_config(run.root)
    accelerator = make_accelerator(2)
    if uses_deepspeed(accelerator):  # these models' weights are smaller than what ZeRO-3 would shard
        accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0
        }
    ranks = Ranks(accelerator.process_index, accelerator.num_processes, accelerator.device)
    start = run.artifact("sft", "model")
    tokenizer = load_tokenizer(start)
    split, reference = load_policy(start, config, accelerator)
    critic = load_critic(run.artifact("reward-model", "model"), split.device, bias=0.5)
    policy, optimizer = prepare(split, reference, config, accelerator, critic)
    whole = whole_weights(accelerator, policy)
    mine = range(ranks.rank, len(PROMPTS), ranks.world)
    batch, micro = 4 // ranks.world, 2 // min(2, ranks.world)
    temperature, ppo = config.generate.temperature, config.ppo
    updater = Updater(accelerator, policy, optimizer, ppo, ranks, temperature, 1.0, rate=lambda step: 1e-3)
    assert shards_weights(accelerator) == (mode == "zero3")
    sharded = sum(weight.numel() for weight in policy.parameters())

    def phase(number: int) -> dict[str, float]:
        """Two steps on this rank's share of the rollouts, whose order is fixed: a step has the same rows whatever the
        ranks."""
        responses = [rollouts[row] for row in mine]
        steps = [[*range(start, start + batch)] for start in range(0, len(mine), batch)]
        plan = [[step[place : place + micro] for place in range(0, batch, micro)] for step in steps]
        of_reference = reference_function(reference, temperature, accelerator.autocast)
        exp = experience(policy, of_reference, responses, plan, temperature)
        targets = targets_of(exp, [float(row % 3) - 1.0 for row in mine], 0.05, ppo, ranks)
        _, row = updater.run(exp, targets, [plan], 2 * number, 2 * number + 2)
        return {name: float(row[name]) for name in NAMES}

    with whole():
        rollouts = sample(split, config, tokenizer)
    curve = [phase(0), phase(1)]
    checkpoints = Checkpoints(run.root / "checkpoints" / f"{mode}-{ranks.world}", ranks, 1)
    checkpoints.save(accelerator, 4, {})
    curve.append(phase(2))
    checkpoints.load(accelerator)
    again = phase(2)
    folder = run.root / f"{mode}-{ranks.world}"
    save_policy(split, tokenizer, folder, accelerator, ranks)
    with whole():
        sampled = [response.tokens for response in sample(split, config, tokenizer)]
    return {"curve": curve, "again": again, "folder": str(folder), "sampled": sampled, "weights": sharded}


def main() -> None:
    run, out = RunDir(Path(sys.argv[1])), Path(sys.argv[2])
    results = {mode: one(mode, run) for mode in ("zero3", "zero2", "ddp0")}
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
