"""A rank of tests/test_ppo_processes.py: its part of a phase's rows, in micro-batches of a few tokens."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from accelerate import Accelerator
from helpers_ppo import tiny_model
from helpers_update import SCORES, TEMPERATURE, rollouts, settings

from pipeline.training.critic_warmup import parameter_groups
from pipeline.training.microbatches import Limits, cut, split_further
from pipeline.training.policy import Policy
from pipeline.training.ranks import Ranks, make_accelerator
from pipeline.training.split import frozen_reference, split_model
from pipeline.training.update import experience, reference_function, targets_of
from pipeline.training.updater import Updater

STEPS = [[[0, 1, 2, 3], [4, 5, 6, 7]], [[3, 1, 0, 2], [7, 6, 4, 5]], [[2, 0, 1, 3], [5, 4, 6, 7]]]
"""Of each optimiser step the rows of both halves; they make one epoch each."""


def main(out: str) -> None:
    accelerator: Accelerator = make_accelerator(1)
    ranks = Ranks(accelerator.process_index, accelerator.num_processes, accelerator.device)
    split = split_model(tiny_model(spread=3.0), 1)
    reference = reference_function(frozen_reference(split), TEMPERATURE, torch.no_grad)
    policy = Policy(split.top, split.hidden_size, seed=1)
    ppo = settings(critic_warmup_steps=1, entropy_coef=0.01)
    optimizer: Any = torch.optim.AdamW(parameter_groups(policy, policy.value), lr=0.01, eps=1e-3)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        plugin = accelerator.state.deepspeed_plugin.deepspeed_config
        plugin |= {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    prepared, optimizer = accelerator.prepare(policy, optimizer)

    per_rank = 8 // ranks.world
    first = ranks.rank * per_rank
    responses = rollouts(split)[first : first + per_rank]
    widths = [len(response.states) for response in responses]
    plans = []
    for number, halves in enumerate(STEPS):
        rows = [row - first for half in halves for row in half if first <= row < first + per_rank]
        cuts = cut(rows, widths, Limits(4, tokens=16))
        plans.append([split_further(cuts, min(per_rank, len(cuts) + number))])
    counts = ranks.gather([len(plan[0]) for plan in plans])
    plans = [[split_further(plan[0], max(c[i] for c in counts))] for i, plan in enumerate(plans)]
    exp = experience(prepared, reference, responses, plans[0], TEMPERATURE)
    targets = targets_of(exp, SCORES[first : first + per_rank], 0.05, ppo, ranks)
    updater = Updater(accelerator, prepared, optimizer, ppo, ranks, TEMPERATURE, 1.0, rate=lambda step: 0.01)
    _, row = updater.run(exp, targets, plans, 0, 3)
    weights = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    if ranks.first:
        torch.save({"weights": weights, "row": row, "figures": targets.figures, "forwards": counts[0]}, out)
    ranks.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
