"""ILQL's losses (Snell et al. 2022, arXiv:2206.11871) as pure functions over the N action tokens of a batch.

An action is a token of an answer, its state the position before it. Rows lie one after the other; behind a row's last
action, its EOS, there is nothing: the value there is 0. Every loss is a SUM over actions: whoever divides by the number
of actions of all micro-batches and ranks gets the mean that neither of them changes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_EXPONENT = 10.0
"""exp(beta * (Q - V)) is cut here, at a weight of 22026, so that one odd token cannot overflow a batch."""


class Terms(NamedTuple):
    """The sums () of ILQL's terms over a batch's actions, and each action's weight (N,) in the last."""

    q: Tensor
    v: Tensor
    cql: Tensor
    awac: Tensor
    awac_weight: Tensor


def q_targets(rewards: Tensor, values: Tensor, last: Tensor, gamma: float) -> Tensor:
    """r + gamma * V(s') for each action (N,), without gradient; V(s') is 0 where `last` (N,) says that a row ends."""
    following = torch.cat([values.detach()[1:], values.new_zeros(1)])
    return rewards + gamma * following.masked_fill(last, 0.0)


def td_loss(q: Tensor, targets: Tensor) -> Tensor:
    """The sum () of (Q_i - target)^2 over heads and actions; `q` is (heads, N), `targets` (N,)."""
    return (q - targets).square().sum()


def expectile_loss(target_q: Tensor, values: Tensor, tau: float) -> Tensor:
    """The sum () of |tau - 1(u < 0)| u^2 with u = Q - V: V is drawn to the tau-expectile of Q (N,).

    As IQL's (Kostrikov et al. 2021, arXiv:2110.06169, eq. 5).
    """
    difference = target_q.detach() - values
    return (torch.where(difference < 0, 1.0 - tau, tau) * difference.square()).sum()


def awac_weights(target_q: Tensor, values: Tensor, beta: float) -> Tensor:
    """exp(beta * (Q - V)) for each action (N,), without gradient; the exponent is at most MAX_EXPONENT."""
    return (beta * (target_q - values).detach()).clamp(max=MAX_EXPONENT).exp()


def ilql_terms(
    *,
    q: Tensor,  # (heads, N) the trained heads' values of the actions
    target_q: Tensor,  # (N,) the smaller of the target heads'
    values: Tensor,  # (N,) V of the actions' states
    q_nll: Tensor,  # (heads, N) cross-entropy of the trained heads, as logits, to the actions
    lm_nll: Tensor,  # (N,) the language model's
    rewards: Tensor,  # (N,)
    last: Tensor,  # (N,) bool
    tau: float,
    gamma: float,
    beta: float,
) -> Terms:
    """All terms: L_Q, L_V, L_CQL (Kumar et al. 2020, arXiv:2006.04779) and L_AWAC (Nair et al. 2020, 2006.09359)."""
    weights = awac_weights(target_q, values, beta)
    return Terms(
        q=td_loss(q, q_targets(rewards, values, last, gamma)),
        v=expectile_loss(target_q, values, tau),
        cql=q_nll.sum(),
        awac=(weights * lm_nll).sum(),
        awac_weight=weights,
    )


def total_loss(terms: Terms, cql_scale: float, awac_scale: float) -> Tensor:
    """L_Q + L_V + cql_scale * L_CQL + awac_scale * L_AWAC, ()."""
    return terms.q + terms.v + cql_scale * terms.cql + awac_scale * terms.awac
