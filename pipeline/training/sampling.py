"""One token a row, sampled from the softmax by one uniform number each."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config.training import Generate
from pipeline.errors import UserError


def luck_of(rows: int, steps: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers (rows, steps) in [0, 1), float64, on the CPU: what is sampled for a row at a step depends on its
    own number alone, whoever else is decoded at the time, and on whatever device."""
    luck = torch.rand(rows, steps, dtype=torch.float64, device=generator.device, generator=generator).cpu()
    return luck.clamp_(max=1.0 - 2.0**-50)  # times a sum, it stays below the sum after rounding


def sample(scores: Tensor, luck: Tensor, generate: Generate) -> tuple[Tensor, Tensor]:
    """Ids (b,) sampled from softmax(scores (b, V) / temperature) under top-k and top-p, and their log-probabilities
    (b,) in float32 under the whole softmax.

    By the inverse of the cumulative distribution, in float64, at `luck` (b,): one random number a row instead of one a
    row and id, which would cost more than the rest of a small model's step.
    """
    scaled = scores.float()
    if generate.temperature != 1.0:
        scaled = scaled / generate.temperature
    scaled = scaled - scaled.amax(dim=-1, keepdim=True)  # (b, V)
    mass = scaled.exp().cumsum(dim=-1, dtype=torch.float64)
    total = mass[:, -1:]
    if generate.top_k or generate.top_p < 1.0:
        mass = keep_likely(scaled, generate.top_k, generate.top_p).exp().cumsum(dim=-1, dtype=torch.float64)
    if not bool(torch.isfinite(mass[:, -1]).all()):
        raise UserError(
            "the policy's scores of the next token are not finite; train with a lower optimizer.lr, which begins anew"
        )
    place = luck[:, None].to(mass) * mass[:, -1:]
    tokens = torch.searchsorted(mass, place, right=True)  # (b, 1): the first id whose mass reaches beyond the place
    logprobs = scaled.gather(-1, tokens) - total.log().float()
    return tokens.squeeze(-1), logprobs.squeeze(-1)


def keep_likely(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Scores (b, V) with -inf outside the `top_k` best (0: all) and outside the smallest set of mass `top_p`.

    The nucleus (Holtzman et al. 2019, arXiv:1904.09751) holds the likeliest ids up to the one that reaches the mass.
    """
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k:
        drop[:, top_k:] = True
        ordered = ordered.masked_fill(drop, -torch.inf)
    if top_p < 1.0:
        mass = ordered.softmax(dim=-1)
        drop |= (mass.cumsum(dim=-1) - mass) >= top_p
    return scores.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
