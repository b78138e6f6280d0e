"""Rewards per token, and advantages from them: by a value function, or from the other answers to the same prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.training.spread import Spread

Estimator = Callable[[Tensor, Tensor], Tensor]


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """log pi - log ref per sampled token: unbiased, signed. Schulman 2020, "Approximating KL Divergence", k1."""
    return logprobs - reference


def kl_k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Half the squared log-ratio per sampled token: never negative, biased, of low variance. Schulman 2020, k2.

    As a loss its gradient, (log pi - log ref) * grad log pi, is that of KL(pi || ref) without bias.
    """
    return 0.5 * (logprobs - reference).square()


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """(r - 1) - log r with r = ref / pi, per sampled token: unbiased, never negative, of low variance.

    Schulman 2020, k3. The samples are pi's, so the ratio must be ref / pi; with the other sign the expectation is
    not KL(pi || ref). The log-ratio is clamped at 20 before exp, which a healthy run never meets.
    """
    log_ratio = (reference - logprobs).clamp(max=20.0)
    return torch.expm1(log_ratio) - log_ratio


ESTIMATORS: dict[str, Estimator] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def token_rewards(payments: Sequence[Sequence[tuple[int, float]]], kl: Tensor, beta: float) -> Tensor:
    """-beta * kl per token, and what is paid on top, packed like `kl` (n,): responses one behind the other.

    `payments`: of each response, (tokens, amount): the amount is paid on the token that makes it so long. The last
    one is on its last sampled token (its EOS, where it has one).
    """
    places, amounts, offset = [], [], 0
    for paid in payments:
        places += [offset + tokens - 1 for tokens, _ in paid]
        amounts += [amount for _, amount in paid]
        offset += paid[-1][0]
    rewards = -beta * kl
    rewards.index_add_(
        0, torch.tensor(places, device=kl.device), torch.tensor(amounts, dtype=kl.dtype, device=kl.device)
    )
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns (N, R), right to left: A_t = delta_t + gamma lam A_{t+1}.

    delta_t = r_t + gamma V_{t+1} - V_t, and nothing follows a response's last token (Schulman et al. 2015,
    arXiv:1506.02438). `mask` (N, R) is 1 on sampled tokens; results are 0 elsewhere. Returns are A + V.
    """
    rewards, values = rewards * mask, values * mask
    following = torch.zeros_like(values[:, 0])
    deltas = rewards - values
    deltas[:, :-1] += gamma * values[:, 1:]
    advantages = []
    for delta in reversed(deltas.unbind(dim=1)):  # behind a response's end all is 0
        following = delta + gamma * lam * following
        advantages.append(following)
    result = torch.stack(advantages[::-1], dim=1) * mask
    return result, (result + values) * mask


def rloo(returns: Tensor, group: int) -> Tensor:
    """Each answer's return less the mean return of its group's other answers; returns (N,), groups side by side.

    REINFORCE leave-one-out (Kool et al. 2019; for language models Ahmadian et al. 2024, arXiv:2402.14740, eq. 8).
    """
    groups = returns.view(-1, group)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group - 1)
    return (groups - others).view(-1)


def grpo(returns: Tensor, group: int) -> Tensor:
    """Returns (N,) less their group's mean, divided by its (unbiased) standard deviation; 0 in a group of equals.

    Shao et al. 2024, arXiv:2402.03300, section 4.1.2. Equal is what differs by no more than the returns' own rounding,
    which would else be blown up to advantages of about 1.
    """
    groups = returns.view(-1, group).double()
    centred = groups - groups.mean(dim=1, keepdim=True)
    spread = groups.std(dim=1, keepdim=True)
    rounding = 8.0 * torch.finfo(returns.dtype).eps * groups.abs().amax(dim=1, keepdim=True)
    return torch.where(spread > rounding, centred / (spread + 1e-6), 0.0).view(-1).to(returns.dtype)


def whiten(values: Tensor, spread: Spread, shift_mean: bool = True) -> Tensor:
    """Values (n,) of one rank, scaled to (biased) variance 1 over all ranks, of which `spread` tells.

    `shift_mean` also takes their mean to 0; without, it stays. Advantages: once a phase and not once a minibatch.
    They are constants of the phase, a minibatch's own mean would take away signal that differs between minibatches,
    and the result would depend on how the phase is cut up. Padding takes no part.
    """
    mean = spread.mean
    white = (values.double() - mean) / math.sqrt(spread.variance + 1e-8)
    return (white if shift_mean else white + mean).to(values.dtype)


def increments(scores: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Rewards from scores of a response's ever longer prefixes, (tokens, score) each: what each adds to the one before.

    Their sum is the last score, that of the whole response.
    """
    rewards, before = [], 0.0
    for tokens, score in scores:
        rewards.append((tokens, score - before))
        before = score
    return rewards
