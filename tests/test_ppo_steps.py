"""Which steps a phase takes, and what they may move: early end, critic warm-up, pauses, cuts by tokens."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from helpers_ppo import tiny_config, tiny_model
from helpers_update import ALONE, SCORES, phase, settings, trained, updater

from pipeline.errors import UserError
from pipeline.training.microbatches import Limits, cut, plan_phase, split_further
from pipeline.training.ranks import Ranks
from pipeline.training.split import split_model
from pipeline.training.update import targets_of

WHOLE = Limits(4)
WIDTHS = [10, 3, 7, 7, 2, 9, 4, 5]


def test_a_forward_is_filled_to_its_limits_with_rows_of_like_width() -> None:
    assert cut(range(8), WIDTHS, Limits(4)) == [[4, 1, 6, 7], [2, 3, 5, 0]]
    assert cut(range(8), WIDTHS, Limits(8, tokens=15)) == [[4, 1, 6, 7], [2, 3], [5], [0]]
    assert cut(range(8), WIDTHS, Limits(2, tokens=15)) == [[4, 1], [6, 7], [2, 3], [5], [0]]
    assert cut([0, 5], WIDTHS, Limits(8, tokens=1)) == [[5], [0]], "a row longer than the limit goes alone"


def test_the_largest_forwards_are_halved_until_there_are_enough() -> None:
    assert split_further([[1, 2, 3, 4, 5], [6, 7]], 4) == [[1, 2], [3], [4, 5], [6, 7]]
    assert split_further([[1], [2]], 2) == [[1], [2]]


def test_each_epoch_has_an_order_of_its_own_and_every_row_once() -> None:
    first, second = plan_phase(WIDTHS, settings(), 4, WHOLE, ALONE, 1)
    assert first != second
    for plan in (first, second):
        assert sorted(row for step in plan for rows in step for row in rows) == list(range(8))
    assert plan_phase(WIDTHS, settings(), 4, WHOLE, ALONE, 1) == [first, second]


class Beside(Ranks):
    """Rank 0 of 2, whose neighbour has more to say in every number."""

    def gather_rows(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack([values, values + 1])


def test_every_rank_cuts_a_step_into_the_same_number_of_forwards() -> None:
    ppo, limits = settings(), Limits(4, tokens=20)
    alone = plan_phase(WIDTHS, ppo, 4, limits, ALONE, 1)
    both = plan_phase(WIDTHS, ppo, 4, limits, Beside(0, 2, torch.device("cpu")), 1)
    for plan, other in zip(alone, both, strict=True):
        for step, cut_again in zip(plan, other, strict=True):
            assert len(cut_again) == len(step) + 1
            assert sorted(chain(*cut_again)) == sorted(chain(*step))


def test_a_phase_ends_behind_the_step_that_finds_the_policy_too_far() -> None:
    """The first step finds a KL of 0 and the second what the first did: a limit between ends the phase at 2 of 4."""
    _, two = trained(WHOLE, settings(), steps=2)
    reached = 2 * two["policy/approx_kl"]  # the mean of 0 and the second step's
    assert reached > 0
    ended, row = trained(WHOLE, settings(max_update_kl=0.9 * reached))
    assert row["update/stopped_early"] == 1.0 and row["update/epochs"] == 1.0
    weights, _ = trained(WHOLE, settings(), steps=2)
    assert all(torch.equal(ended[name], weight) for name, weight in weights.items())
    _, row = trained(WHOLE, settings(max_update_kl=1e6))
    assert row["update/stopped_early"] == 0.0 and row["update/epochs"] == 2.0


@pytest.mark.parametrize("limit", [None, 1e-12], ids=["full", "ends-early"])
def test_a_paused_phase_goes_on_to_the_same_weights(limit: float | None) -> None:
    ppo = settings(max_update_kl=limit)
    straight, expected = trained(WHOLE, ppo)
    policy, _, plans, exp = phase(split_model(tiny_model(spread=3.0), 1), WHOLE, ppo)
    targets = targets_of(exp, SCORES, 0.05, ppo, ALONE)
    steps = updater(policy, ppo)
    taken, row = steps.run(exp, targets, plans, 0, 4, pause=lambda step: step == 1)
    assert not taken.complete and len(taken.norms) == 1
    for _ in range(2):  # a phase that is complete takes no further step
        taken, row = steps.run(exp, targets, plans, 0, 4, taken)
    assert taken.complete and row == expected
    assert all(torch.equal(weight, straight[name]) for name, weight in policy.state_dict().items())


@pytest.mark.parametrize("warm", [0, 2, 3])
def test_critic_warm_up_moves_nothing_of_the_policy(warm: int) -> None:
    """AdamW with a weight decay of 0.5, which would move every weight that is stepped."""
    before = phase(split_model(tiny_model(spread=3.0), 1), WHOLE)[0].state_dict()
    weights, row = trained(WHOLE, settings(critic_warmup_steps=warm), steps=2, adam=True)
    moved = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
    assert "value.2.weight" in moved
    assert any(name.startswith("top.") for name in moved) is (warm < 2)
    # The rates of the second step: the policy's, and the value function's.
    assert (row["learning_rate_group_0"], row["learning_rate_group_1"]) == (0.0 if warm >= 2 else 0.01, 0.01)


def test_behind_the_warm_up_the_policy_is_stepped_as_by_a_fresh_optimiser() -> None:
    """Adam's first step is lr * sign(gradient), beside its weight decay, however many steps the critic had."""
    ppo = settings(critic_warmup_steps=2)
    policy, _, plans, exp = phase(split_model(tiny_model(spread=3.0), 1), WHOLE, ppo)
    targets = targets_of(exp, SCORES, 0.05, ppo, ALONE)
    steps = updater(policy, ppo, adam=True)
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    taken, _ = steps.run(exp, targets, plans, 0, 4, pause=lambda step: step == 3)
    assert len(taken.norms) == 3
    name = "top.head.weight"
    change = policy.get_parameter(name).detach() - before[name] * (1 - 0.01 * 0.5)
    assert change.abs().median().item() == pytest.approx(0.01, rel=1e-3)


def test_a_gradient_that_is_not_finite_is_an_error() -> None:
    policy, _, plans, exp = phase(split_model(tiny_model(spread=3.0), 1), WHOLE)
    targets = targets_of(exp, [float("nan")] * 8, 0.05, settings(), ALONE)
    with pytest.raises(UserError, match="up to optimiser step 4 is not finite"):
        updater(policy, settings()).run(exp, targets, plans, 0, 4)


@pytest.mark.parametrize(
    ("ppo", "fault"),
    [
        ({"kl_placement": "loss"}, "ppo.kl_estimator"),
        ({"advantage": "rloo", "group_size": 2, "whiten_rewards": True}, "ppo.whiten_rewards"),
        ({"advantage": "grpo", "group_size": 2, "critic_warmup_steps": 1}, "ppo.critic_warmup_steps"),
        ({"advantage": "grpo", "group_size": 2, "dense_reward_every": 4}, "ppo.dense_reward_every"),
        ({"critic_warmup_steps": 8}, "ppo.critic_warmup_steps"),
        ({"critic_warmup_steps": 1, "vf_coef": 0.0}, "ppo.critic_warmup_steps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_settings_that_would_do_nothing_are_refused(ppo: dict[str, object], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        tiny_config(ppo={**tiny_config().ppo.model_dump(), **ppo})
