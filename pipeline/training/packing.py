"""Several sequences in one row, each blind to the others: rows almost without padding, the same losses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from pipeline.training.batches import E


@dataclass(frozen=True)
class PackedRow(Generic[E]):
    """Examples that stand one behind the other in a row."""

    examples: tuple[E, ...]

    @property
    def length(self) -> int:
        return sum(example.length for example in self.examples)


def pack(examples: Sequence[E], width: int) -> list[PackedRow[E]]:
    """Rows of at most `width` tokens: longest first, each into the first row with room (first-fit decreasing)."""
    rows: list[list[E]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda example: -example.length):
        place = next((at for at, free in enumerate(room) if free >= example.length), None)
        if place is None:
            rows.append([])
            room.append(max(width, example.length))
            place = len(rows) - 1
        rows[place].append(example)
        room[place] -= example.length
    return [PackedRow(tuple(row)) for row in rows]


def positions_and_segments(lengths: Iterable[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Of right-padded rows of sequences: positions, from 0 in each, and the sequence's number, -1 where padding is.

    int64, (B, T) each.
    """
    rows = [list(row) for row in lengths]
    width = max(map(sum, rows))
    positions, segments = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), -1)
    for at, row in enumerate(rows):
        start = 0
        for number, length in enumerate(row):
            positions[at, start : start + length] = torch.arange(length)
            segments[at, start : start + length] = number
            start += length
    return positions, segments


def block_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask: a token sees what lies before it in its own sequence. # (B, T) -> (B, 1, T, T)"""
    return additive(segments[:, None, :] == segments[:, :, None], dtype)


def additive(related: Tensor, dtype: torch.dtype) -> Tensor:
    """A causal attention mask of the pairs (query, key) that `related` allows: 0, and elsewhere the least number.

    (B, T, T) bool -> (B, 1, T, T). No row may be empty: a token has to see itself.
    """
    width = related.shape[-1]
    causal = torch.ones(width, width, dtype=torch.bool, device=related.device).tril()
    mask = torch.zeros(related.shape, dtype=dtype, device=related.device)
    return mask.masked_fill(~(causal & related), torch.finfo(dtype).min).unsqueeze(1)
