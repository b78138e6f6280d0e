"""Forwards over rows that stand one behind the other: nothing is padded, and attention keeps the rows apart.

The attention is the reward service's (`pipeline.serving.scoring`), so both run a row in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gptj.modeling_gptj import GPTJAttention

from pipeline.serving.scoring import PACKABLE, PACKED, gptj_attention, laid_out


@contextmanager
def packed(part: nn.Module, lengths: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """Forwards of `part` inside take rows of these lengths as one; gives their positions (1, N), from 0 in each."""
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    with attention_of(part), laid_out(lengths):
        yield positions.unsqueeze(0)


@contextmanager
def attention_of(part: nn.Module) -> Iterator[None]:
    """Have the part's attention keep rows apart that `laid_out` names, whatever it is at other times."""
    modules = list(part.modules())
    configs = {id(config): config for config in map(_config, modules) if config is not None}
    before = {key: config._attn_implementation for key, config in configs.items()}
    own = [module for module in modules if isinstance(module, GPTJAttention)]  # has no choice of implementations
    for config in configs.values():
        config._attn_implementation = PACKED
    for module in own:
        module._attn = gptj_attention
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        for module in own:
            del module._attn


def is_packable(model_type: str) -> bool:
    """Whether models of the type can be run so."""
    return model_type in PACKABLE


def _config(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if hasattr(config, "_attn_implementation") else None
