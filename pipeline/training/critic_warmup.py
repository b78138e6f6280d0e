"""The first optimiser steps may train the value function alone: the policy's weights then do not move at all.

Its gradients are exactly 0 in those steps, and its learning rate is 0, so that neither moments nor weight decay move
it; behind the last of them AdamW's step counts of all that never had a gradient begin anew. No parameter is taken out:
data parallelism and ZeRO expect a gradient of every one.
"""

from __future__ import annotations

from typing import Any

from torch import nn

NAME = "name"
POLICY = "policy"
RATE = "rate"
"""Key of a parameter group: its learning rate as a multiple of the schedule's."""


def parameter_groups(policy: nn.Module, critic: nn.Module, critic_rate: float = 1.0) -> list[dict[str, Any]]:
    """The trained parameters of `policy`, those of its part `critic` apart, as an optimiser's groups."""
    theirs = {id(parameter) for parameter in critic.parameters()}
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in theirs], NAME: POLICY, RATE: 1.0},
        {"params": [p for p in trained if id(p) in theirs], NAME: "critic", RATE: critic_rate},
    ]
    return [group for group in groups if group["params"]]


def rates_of(optimizer: Any, rate: float, critic_alone: bool) -> list[float]:
    """Each group's learning rate in a step for which the schedule says `rate`."""
    return [
        0.0 if critic_alone and group.get(NAME) == POLICY else rate * group.get(RATE, 1.0)
        for group in optimizer.param_groups
    ]


def set_rates(optimizer: Any, rate: float, critic_alone: bool) -> None:
    """The learning rates of the next step."""
    for group, its_rate in zip(optimizer.param_groups, rates_of(optimizer, rate, critic_alone), strict=True):
        group["lr"] = its_rate


def begin_policy(optimizer: Any) -> None:
    """What never had a gradient is to be updated as by a fresh optimiser: a count of steps would shrink its first."""
    for state in optimizer.state.values():
        if "step" in state and not bool(state["exp_avg_sq"].any()):
            state["step"] = state["step"] * 0
