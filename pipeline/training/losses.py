"""PPO's clipped losses on packed tokens: every argument is (n,), one entry a sampled token, no padding anywhere.

All are sums; the caller divides by the minibatch's tokens over all ranks, so that neither micro-batches nor the
number of ranks change the result. Source: Schulman et al. 2017, arXiv:1707.06347; value clipping as in
openai/baselines' ppo2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossSums:
    """Sums over tokens; `policy` and `value` carry gradients, the rest is for the log."""

    policy: Tensor
    value: Tensor
    statistics: Tensor
    """Of the names in STATISTICS, in order."""


STATISTICS = ("policy/approx_kl", "policy/clipfrac", "ratio", "values/clipfrac", "values/values_error", "values/mean")


def ppo_loss(
    logprobs: Tensor,
    values: Tensor,
    old_logprobs: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    cliprange: float,
    cliprange_value: float,
) -> LossSums:
    """Sums of the policy loss and of half the squared value error, each the worse of clipped and not."""
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    near = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    errors, near_errors = (values - returns).square(), (near - returns).square()
    with torch.no_grad():
        statistics = torch.stack(
            [
                (torch.expm1(log_ratio) - log_ratio).sum(),  # k3 of KL(old || new): old's samples, ratio new / old
                (clipped > unclipped).float().sum(),
                ratio.sum(),
                (near_errors > errors).float().sum(),
                errors.sum(),
                values.sum(),
            ]
        ).double()
    return LossSums(torch.max(unclipped, clipped).sum(), 0.5 * torch.max(errors, near_errors).sum(), statistics)
