"""Forwards over rows that stand one behind the other: nothing is padded, and attention keeps the rows apart.

The attention is the reward service's (`pipeline.serving.scoring`), so both run a row in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.serving.scoring import PACKABLE, PACKED, gptj_attention, laid_out
from pipeline.training.attention import attention_replaced


@contextmanager
def packed(part: nn.Module, lengths: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """Forwards of `part` inside take rows of these lengths as one; gives their positions (1, N), from 0 in each."""
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    with attention_of(part), laid_out(lengths):
        yield positions.unsqueeze(0)


@contextmanager
def attention_of(part: nn.Module) -> Iterator[None]:
    """Have the part's attention keep rows apart that `laid_out` names, whatever it is at other times."""
    with attention_replaced([part], PACKED, gptj_attention):
        yield


def is_packable(model_type: str) -> bool:
    """Whether models of the type can be run so."""
    return model_type in PACKABLE
