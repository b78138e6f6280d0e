"""Batches of supervised training: planned by length for all ranks at once, cut to what one forward may hold, padded.

The batch size is global. Every rank makes the same plan, a pure function of its arguments, and takes its rows of each
batch; a position in training is therefore just a number of steps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

BUCKET_BATCHES = 16
"""Batches are cut from this many batches' worth of examples, sorted by length: little padding, still random."""


class Sized(Protocol):
    """An example that knows how long its padded row will be."""

    @property
    def length(self) -> int: ...


E = TypeVar("E", bound=Sized)


def plan_epoch(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, shuffled: bool = True
) -> list[list[int]]:
    """Batches of example indices for one epoch: every example once, similar lengths together, order shuffled.

    Not `shuffled`, they come as they are. The last batch to be cut may be smaller.
    """
    order = list(range(len(lengths)))
    if not shuffled:
        return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    shuffle = random.Random(f"{seed}/{epoch}")
    shuffle.shuffle(order)
    bucket = batch_size * BUCKET_BATCHES
    batches = []
    for start in range(0, len(order), bucket):
        indices = sorted(order[start : start + bucket], key=lambda index: lengths[index])  # stable: ties stay shuffled
        batches += [indices[at : at + batch_size] for at in range(0, len(indices), batch_size)]
    shuffle.shuffle(batches)
    return batches


def epoch_steps(examples: int, batch_size: int) -> int:
    """Optimiser steps of an epoch; the last batch may be smaller."""
    return -(-examples // batch_size)


def split_by_tokens(examples: Sequence[E], max_tokens: int) -> list[list[E]]:
    """Cut a rank's examples, longest first, into pieces of at most `max_tokens` padded tokens (at least one each)."""
    pieces: list[list[E]] = []
    for example in sorted(examples, key=lambda example: -example.length):
        if pieces and (len(pieces[-1]) + 1) * pieces[-1][0].length <= max_tokens:
            pieces[-1].append(example)
        else:
            pieces.append([example])
    return pieces


def split_into(pieces: Sequence[list[E]], number: int) -> list[list[E]]:
    """At least `number` pieces, as far as there are examples: the largest is halved until there are enough."""
    cut = [list(piece) for piece in pieces]
    while cut and len(cut) < number:
        largest = max(range(len(cut)), key=lambda at: len(cut[at]))
        piece = cut[largest]
        if len(piece) < 2:
            break
        cut[largest : largest + 1] = [piece[: len(piece) // 2], piece[len(piece) // 2 :]]
    return cut


def pad_rows(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Right-pad id lists to an int64 tensor. # (B, T)"""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
