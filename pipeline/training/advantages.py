"""Rewards per token and generalised advantage estimation, on a phase's padded responses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SumOverRanks = Callable[[Tensor], Tensor]


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """log pi - log ref per sampled token: unbiased, signed. Schulman 2020, "Approximating KL Divergence", k1."""
    return logprobs - reference


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """(r - 1) - log r with r = ref / pi, per sampled token: unbiased, never negative, of low variance.

    Schulman 2020, k3. The samples are pi's, so the ratio must be ref / pi; with the other sign the expectation is
    not KL(pi || ref). The log-ratio is clamped at 20 before exp, which a healthy run never meets.
    """
    log_ratio = (reference - logprobs).clamp(max=20.0)
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(scores: Tensor, kl: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """-beta * kl per token, and the response's score on its last sampled token (its EOS, where it has one).

    scores (N,), kl (N, R) with zeros behind each response, lengths (N,) -> (N, R).
    """
    rewards = -beta * kl
    rewards[torch.arange(len(scores), device=scores.device), lengths - 1] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns (N, R), right to left: A_t = delta_t + gamma lam A_{t+1}.

    delta_t = r_t + gamma V_{t+1} - V_t, and nothing follows a response's last token (Schulman et al. 2015,
    arXiv:1506.02438). `mask` (N, R) is 1 on sampled tokens; results are 0 elsewhere. Returns are A + V.
    """
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(values)
    following = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = following
    return advantages, (advantages + values) * mask


def whiten(advantages: Tensor, sum_over_ranks: SumOverRanks) -> Tensor:
    """Advantages of all the phase's tokens (n,), shifted and scaled to mean 0 and (biased) variance 1 over all ranks.

    Once a phase and not once a minibatch: the advantages are constants of the phase, a minibatch's own mean would
    take away signal that differs between minibatches, and the result would depend on how the phase is cut up.
    Padding takes no part. Float64 sums, so that the number of ranks shows in the last digits only.
    """
    wide = advantages.double()
    count, total = sum_over_ranks(torch.stack([wide.new_tensor(float(wide.numel())), wide.sum()]))
    mean = total / count
    variance = sum_over_ranks((wide - mean).square().sum()) / count
    white: Tensor = (wide - mean) * torch.rsqrt(variance + 1e-8)
    return white.to(advantages.dtype)


def explained_variance(values: Tensor, returns: Tensor, sum_over_ranks: SumOverRanks) -> float:
    """1 - Var(returns - values) / Var(returns) over all ranks' tokens; 0 where the returns do not vary."""
    error = (returns - values).double()
    wide = returns.double()
    sums = torch.stack(
        [wide.new_tensor(float(wide.numel())), wide.sum(), wide.square().sum(), error.sum(), error.square().sum()]
    )
    count, s, ss, e, ee = sum_over_ranks(sums).tolist()
    variance = ss / count - (s / count) ** 2
    return 1.0 - (ee / count - (e / count) ** 2) / variance if variance > 1e-12 else 0.0
