"""One training under what `accelerate launch` says and on as many ranks, over fixed rollouts; used by
test_distributed_training.py, which compares them: `ranks_training.py RUN OUT`.

Each rank updates on its share of the same 8 rollouts. Rank 0 writes OUT: for DDP, ZeRO-2 and ZeRO-3 in turn (alone: one
process) the metrics of each phase, the same behind a checkpoint, whether sampling came out right, and the saved model's
folder.
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
from pipeline.training.update import experience, plan_phase, reference_function, targets_of
from pipeline.training.updater import Updater

PROMPTS = [[5, 9, 200], [7], [11, 12, 13, 14, 15, 16, 17], [40, 41], [99, 98, 97, 96], [3, 4], [8, 8, 8], [60]]
NAMES = ("losses/policy_loss", "losses/value_loss", "policy/approx_kl", "values/mean", "grad_norm")


def sample(split: Split, config: Any, tokenizer: Any) -> list[Response]:
    stops = StopSequences(tokenizer, [])
    return decode(split, PROMPTS, config.generate, stops, 77, torch.Generator().manual_seed(0))


def one(mode: str, run: RunDir) -> dict[str, Any]:
    """Two phases, a checkpoint, a third phase; and the third again, from the checkpoint."""
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
        with whole():
            rollouts = sample(split, config, tokenizer) if number == 0 else first
            if number == 0:
                first[:] = rollouts
        responses = [first[row] for row in mine]
        # Plain order: the rows that share a step must be the same whatever the ranks.
        plans = plan_phase([1] * len(responses), ppo, batch, micro, 0)
        plans = [[[[*range(s, s + batch)][m : m + micro] for m in range(0, batch, micro)] for s in range(0, len(mine), batch)]]
        of_reference = reference_function(reference, temperature, accelerator.autocast)
        exp = experience(policy, of_reference, responses, plans[0], temperature)
        scores = [float(row % 3) - 1.0 for row in mine]
        targets = targets_of(exp, scores, 0.05, ppo, ranks)
        _, row = updater.run(exp, targets, plans, 2 * number, 2 * number + 2)
        return {name: float(row[name]) for name in NAMES}

    first: list[Response] = []
    curve = [phase(0), phase(1)]
    checkpoints = Checkpoints(run.root / "checkpoints" / f"{mode}-{ranks.world}", ranks, 1)
    checkpoints.save(accelerator, 4, {})
    curve.append(phase(2))
    checkpoints.load(accelerator)
    again = phase(2)
    folder = run.root / f"{mode}-{ranks.world}"
    with whole():
        save_policy(split, tokenizer, folder, accelerator, ranks)
        sampled = [response.tokens for response in sample(split, config, tokenizer)]
    return {"curve": curve, "again": again, "folder": str(folder), "sampled": sampled, "weights": sharded}


def main() -> None:
    run, out = RunDir(Path(sys.argv[1])), Path(sys.argv[2])
    modes = ("zero3", "zero2", "ddp0") if "RANK" in os.environ else ("ddp0",)
    results = {mode: one(mode, run) for mode in modes}
    if os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
