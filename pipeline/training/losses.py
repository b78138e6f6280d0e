"""The clipped losses on packed tokens: every argument is (n,), one entry a sampled token, no padding anywhere.

All are sums; the caller divides by the minibatch's tokens over all ranks, so that neither micro-batches nor the
number of ranks change the result. Source: Schulman et al. 2017, arXiv:1707.06347; value clipping as in
openai/baselines' ppo2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config.methods import PPO
from pipeline.training.advantages import ESTIMATORS

SUMS = (
    "losses/policy_loss",
    "losses/value_loss",
    "losses/kl",
    "losses/entropy",
    "policy/approx_kl",
    "policy/clipfrac",
    "ratio",
    "values/clipfrac",
    "values/values_error",
    "values/values_mape_error",
    "values/mean",
    "values/squares",
)
"""What is summed over tokens for the log, in order."""
EXTREMES = ("values/least", "values/greatest")
"""What is logged of a minibatch's tokens by its greatest entry; the least is kept with its sign turned."""


@dataclass(frozen=True)
class Tokens:
    """What sampled tokens are trained towards, and where they come from."""

    old_logprobs: Tensor
    reference: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class LossSums:
    """`total` carries gradients: the sum over tokens of the whole objective. The rest is for the log."""

    total: Tensor
    sums: Tensor
    """(len(SUMS),) float64."""
    extremes: Tensor
    """(len(EXTREMES),) float64."""


def ppo_loss(
    logprobs: Tensor,
    values: Tensor,
    entropy: Tensor | None,
    tokens: Tokens,
    ppo: PPO,
    kl_weight: float,
    policy_weight: float = 1.0,
) -> LossSums:
    """policy + vf_coef * value + kl_weight * KL - entropy_coef * entropy; the value's part with GAE only.

    `policy_weight` 0 leaves the value loss alone (every gradient of the others is then exactly 0).
    """
    policy, ratio, clipped = policy_loss(logprobs, tokens.old_logprobs, tokens.advantages, ppo.cliprange)
    value, value_clipped = value_loss(values, tokens.old_values, tokens.returns, ppo.cliprange_value)
    nothing = logprobs.new_zeros(())
    kl = ESTIMATORS[ppo.kl_estimator](logprobs, tokens.reference).sum() if kl_weight else nothing
    bonus = entropy.sum() if entropy is not None else nothing
    total = policy_weight * (policy + kl_weight * kl - ppo.entropy_coef * bonus)
    if ppo.advantage == "gae":
        total = total + ppo.vf_coef * value
    with torch.no_grad():
        log_ratio = logprobs - tokens.old_logprobs
        errors = values - tokens.returns
        sums = [
            policy,
            value,
            kl,
            bonus,
            (torch.expm1(log_ratio) - log_ratio).sum(),  # k3 of KL(old || new): old's samples, ratio new / old
            clipped,
            ratio.sum(),
            value_clipped,
            errors.square().sum(),
            (errors.abs() / (tokens.returns.abs() + 1e-2)).sum(),
            values.sum(),
            values.square().sum(),
        ]
        extremes = torch.stack([-values.min(), values.max()]).double()
        return LossSums(total, torch.stack(sums).double(), extremes)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of max(-A rho, -A clip(rho, 1 +- cliprange)), rho = pi / pi_old (n,), and how many the clip decided."""
    ratio = (logprobs - old_logprobs).exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    return torch.max(unclipped, clipped).sum(), ratio, (clipped > unclipped).float().sum()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """The sum of half the squared error, the worse of clipped and not, and how many the clip decided."""
    near = old_values + (values - old_values).clamp(-cliprange, cliprange)
    errors, near_errors = (values - returns).square(), (near - returns).square()
    return 0.5 * torch.max(errors, near_errors).sum(), (near_errors > errors).float().sum()
