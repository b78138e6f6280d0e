"""Decoding with ILQL: the language model, pushed towards what the target heads value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.training.ilql_heads import TargetHeads
from pipeline.training.split import copied


@dataclass(frozen=True)
class Steering:
    """log pi(a | s) + beta * (min Q(s, a) - V(s)), up to a constant of each state.

    V and the normaliser of log pi are the same for all tokens of a state, so they move no sample, no top-k and no
    top-p, and are not computed. The heads see only the position that is sampled from; the trained Q heads are not used.
    """

    q_heads: Any
    beta: float

    @torch.no_grad()
    def __call__(self, logits: Tensor, hidden: Tensor) -> Tensor:  # (b, V), (b, H) -> (b, V)
        """Scores whose softmax is the policy, in at least float32."""
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.beta == 0:
            return scores
        wide = hidden.to(next(self.q_heads.parameters()).dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            q = torch.stack([head(wide) for head in self.q_heads]).amin(dim=0)  # (b, V)
        return scores + self.beta * q.to(scores.dtype)


def steer(targets: TargetHeads, beta: float, dtype: torch.dtype = torch.float32) -> Steering:
    """Decode by the target heads as they are now; where `dtype` is not theirs, by a copy of them that takes its part
    of memory but is read faster, a token at a time."""
    heads = targets.q_heads
    return Steering(heads if dtype == torch.float32 else copied(heads, dtype), beta)


def beta_suffix(beta: float) -> str:
    """How a metric names the beta it was decoded with, as trlX does: "@beta=4"."""
    return f"@beta={beta:g}"
