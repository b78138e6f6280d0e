"""A phase of a tiny model, without scores and checkpoints: its rollouts, its experience and its updates."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from helpers_ppo import tiny_model, tokenizer

from pipeline.config.methods import PPO
from pipeline.config.training import Generate
from pipeline.training.critic_warmup import parameter_groups
from pipeline.training.decode import Response, decode
from pipeline.training.microbatches import Limits, plan_phase
from pipeline.training.policy import Policy
from pipeline.training.ranks import Ranks
from pipeline.training.split import Split, frozen_reference, split_model
from pipeline.training.stopping import StopSequences
from pipeline.training.update import Experience, experience, reference_function, targets_of
from pipeline.training.updater import Updater

ALONE = Ranks(0, 1, torch.device("cpu"))
TEMPERATURE = 0.7
PROMPTS = [[5, 9, 200], [7], [11, 12, 13, 14, 15, 16, 17], [40, 41], [99, 98, 97, 96], [3, 4], [8, 8, 8], [60]]
LENGTHS = [9, 4, 7, 1, 8, 2, 5, 9]
SCORES = [float(row % 3) - 1.0 for row in range(len(PROMPTS))]
BATCH = 4


def settings(**more: Any) -> PPO:
    """Eight rollouts, two epochs: four steps of BATCH rows."""
    return PPO(**{"num_rollouts": 8, "chunk_size": 8, "ppo_epochs": 2, **more})


def rollouts(split: Split) -> list[Response]:
    """Responses to PROMPTS, cut to LENGTHS as if they had ended there: a random model hardly ever does."""
    generate = Generate(max_new_tokens=max(LENGTHS), temperature=TEMPERATURE)
    noise = torch.Generator().manual_seed(0)
    whole = decode(split, PROMPTS, generate, StopSequences(tokenizer(), []), 77, noise)
    return [
        replace(response, tokens=response.tokens[:length], states=response.states[: len(response.prompt) + length - 1])
        for response, length in zip(whole, LENGTHS, strict=True)
    ]


def phase(
    split: Split, limits: Limits, ppo: PPO | None = None, policy: Policy | None = None
) -> tuple[Policy, list[Response], Any, Experience]:
    """A policy with its rollouts, their plan and their experience."""
    policy = policy or Policy(split.top, split.hidden_size, seed=1)
    reference = reference_function(frozen_reference(split), TEMPERATURE, torch.no_grad)
    responses = rollouts(split)
    widths = [len(response.states) for response in responses]
    plans = plan_phase(widths, ppo or settings(), BATCH, limits, ALONE, 1, 0, 0)
    return policy, responses, plans, experience(policy, reference, responses, plans[0], TEMPERATURE)


def updater(policy: Policy, ppo: PPO, adam: bool = False) -> Updater:
    """Its optimiser is plain gradient descent, or AdamW with much weight decay."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    values = policy.critic or policy.value
    assert values is not None
    groups = parameter_groups(policy, values)
    optimizer: Any = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.5) if adam else torch.optim.SGD(groups, lr=0.1)
    rate = optimizer.defaults["lr"]
    prepared, optimizer = accelerator.prepare(policy, optimizer)
    return Updater(accelerator, prepared, optimizer, ppo, ALONE, TEMPERATURE, 1.0, rate=lambda step: rate)


def trained(
    limits: Limits, ppo: PPO | None = None, steps: int = 4, adam: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights after the first `steps` of a phase, and its row."""
    ppo = ppo or settings()
    policy, _, plans, exp = phase(split_model(tiny_model(spread=3.0), 1), limits, ppo)
    targets = targets_of(exp, SCORES, 0.05, ppo, ALONE)
    taken, row = updater(policy, ppo, adam).run(exp, targets, plans, 0, steps)
    assert taken.complete
    return copy.deepcopy(policy.state_dict()), row
