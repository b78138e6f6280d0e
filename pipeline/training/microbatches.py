"""How a phase's rows are cut into optimiser steps, and a step's rows into forwards. No cut changes a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.config.methods import PPO
from pipeline.config.training import Train
from pipeline.training.prompts import derive_seed
from pipeline.training.ranks import Ranks

Minibatch = list[list[int]]
"""The rows of one optimiser step, by micro-batch."""


@dataclass(frozen=True)
class Limits:
    """What fits into a forward."""

    rows: int
    tokens: int | None = None
    """Of all rows together; None counts rows only. A row that is longer goes alone."""


def limits_of(train: Train) -> Limits:
    """`train.micro_batch_size` and `train.micro_batch_tokens`."""
    return Limits(train.micro_batch_size or train.batch_size, train.micro_batch_tokens)


def plan_phase(
    widths: Sequence[int], ppo: PPO, batch_size: int, limits: Limits, ranks: Ranks, *seed: int | str
) -> list[list[Minibatch]]:
    """The phase's minibatches, epoch by epoch; each epoch cuts a fresh permutation of the rows.

    `widths` are the tokens that a row has in a forward. Every rank cuts the same step into the same number of
    forwards: ZeRO reduces gradients, and gathers weights, in each of them.
    """
    plans = []
    for epoch in range(ppo.ppo_epochs):
        generator = torch.Generator().manual_seed(derive_seed(*seed, "epoch", epoch))
        order = torch.randperm(len(widths), generator=generator).tolist()
        plans.append(plan_epoch(widths, batch_size, limits, order))
    if limits.tokens is not None and ranks.world > 1:
        ours = torch.tensor([len(step) for plan in plans for step in plan])
        counts = iter(ranks.gather_rows(ours).amax(dim=0).tolist())
        plans = [[split_further(step, next(counts)) for step in plan] for plan in plans]
    return plans


def plan_epoch(widths: Sequence[int], batch_size: int, limits: Limits, order: Sequence[int]) -> list[Minibatch]:
    """Cut the rows, in `order`, into minibatches; inside each, rows of like length share a micro-batch.

    Which rows meet in an optimiser step is left to chance; how a step is cut into forwards is not part of the result.
    """
    return [cut(order[start : start + batch_size], widths, limits) for start in range(0, len(order), batch_size)]


def cut(rows: Sequence[int], widths: Sequence[int], limits: Limits) -> Minibatch:
    """A step's rows, narrow ones first, in micro-batches that are filled as far as the limits go."""
    parts: Minibatch = []
    tokens = 0
    for row in sorted(rows, key=lambda row: (widths[row], row)):  # attention takes equal lengths together
        tokens += widths[row]
        if parts and len(parts[-1]) < limits.rows and (limits.tokens is None or tokens <= limits.tokens):
            parts[-1].append(row)
        else:
            parts.append([row])
            tokens = widths[row]
    return parts


def split_further(minibatch: Minibatch, count: int) -> Minibatch:
    """The same rows in `count` micro-batches, no fewer than there are: the largest ones are halved."""
    parts = list(minibatch)
    while len(parts) < count:
        place = max(range(len(parts)), key=lambda place: len(parts[place]))
        half = -(-len(parts[place]) // 2)
        parts[place : place + 1] = [parts[place][:half], parts[place][half:]]
    return parts
