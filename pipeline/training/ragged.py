"""Attention of one new position a row over caches of unlike lengths, without paying for the longest in every row.

On a CPU the attention of a decoding step is bound by how many keys and values it reads. Neighbours of like length share
a call that reads as far as their longest; transformers' own attention does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.training.attention import attention_replaced

Segment = tuple[int, int, int]
"""Rows first to last (exclusive), and the columns that they may look at."""
_NAME = "sdpa_ragged"
_CALL = 64
"""What a further call costs, in columns of a row."""

_segments: ContextVar[Sequence[Segment]] = ContextVar("segments", default=())


def segments_of(lengths: Sequence[int]) -> list[Segment]:
    """The cheapest cut of rows of these `lengths` into runs of neighbours, each as wide as its longest."""
    best: list[tuple[int, int]] = [(0, 0)]  # of the first j rows: cost, and where the last run begins
    for end in range(1, len(lengths) + 1):
        width, choice = 0, (2**62, 0)
        for start in range(end - 1, -1, -1):
            width = max(width, lengths[start])
            choice = min(choice, (best[start][0] + width * (end - start) + _CALL, start))
        best.append(choice)
    segments, end = [], len(lengths)
    while end:
        start = best[end][1]
        segments.append((start, end, max(lengths[start:end])))
        end = start
    return segments[::-1]


@contextmanager
def ragged_attention(*parts: nn.Module) -> Iterator[None]:
    """Have the parts' attention look at `in_segments` where it is transformers' "sdpa", or GPT-J's."""
    with attention_replaced(parts, _NAME, _gptj_attention, only=("sdpa",)):
        yield


@contextmanager
def in_segments(segments: Sequence[Segment]) -> Iterator[None]:
    """Forwards inside attend segment by segment."""
    token = _segments.set(segments)
    try:
        yield
    finally:
        _segments.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,  # (b, heads, T, D)
    key: Tensor,  # (b, heads or fewer, columns, D)
    value: Tensor,
    attention_mask: Tensor | None,  # (b, 1, T, columns)
    **named: Any,
) -> tuple[Tensor, None]:
    """transformers' "sdpa", segment by segment."""

    def part(*tensors: Any) -> Tensor:
        result: Tensor = sdpa_attention_forward(module, *tensors, **named)[0]
        return result

    return _by_segments(part, query, key, value, attention_mask), None


def _gptj_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """The same for GPT-J, whose result is (b, heads, T, D)."""
    alone = attention_mask is None and query.shape[2] > 1

    return _by_segments(partial(scaled_dot_product_attention, is_causal=alone), query, key, value, attention_mask), None


def _by_segments(
    attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """What `attention` (query, key, value, mask) makes of each segment's rows and columns; of all at once where there
    is one segment, or no mask."""
    segments = _segments.get()
    if len(segments) < 2 or mask is None:
        return attention(query, key, value, mask)
    parts = [
        attention(
            query[first:last],
            key[first:last, :, :width],
            value[first:last, :, :width],
            mask[first:last, ..., :width],
        )
        for first, last, width in segments
    ]
    return torch.cat(parts)


AttentionInterface.register(_NAME, _attention)
