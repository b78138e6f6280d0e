"""Advantages, penalties, losses and controllers against numbers worked out by hand or in slow float64."""

from __future__ import annotations

import math
import statistics
from typing import Literal

import pytest
import torch

from pipeline.config.methods import PPO
from pipeline.config.training import Optimizer, Scheduler
from pipeline.training.advantages import gae, kl_k1, kl_k3, token_rewards, whiten
from pipeline.training.control import KLController, RunningMoments, clip_scores, scale_of
from pipeline.training.experience import Packing
from pipeline.training.losses import SUMS, Tokens, ppo_loss
from pipeline.training.schedule import learning_rate
from pipeline.training.spread import merged, part_of


def test_gae_is_the_discounted_sum_of_residuals() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, gamma, lam = [5, 1, 3], 0.97, 0.9
    rewards, values = torch.randn(3, 5, generator=generator), torch.randn(3, 5, generator=generator)
    mask = Packing(lengths).mask(torch.device("cpu"))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        r, v = rewards[row, :length].double().tolist(), [*values[row, :length].double().tolist(), 0.0]
        for t in range(length):
            slow = sum((gamma * lam) ** (i - t) * (r[i] + gamma * v[i + 1] - v[i]) for i in range(t, length))
            assert advantages[row, t].item() == pytest.approx(slow, abs=1e-5)
            assert returns[row, t].item() == pytest.approx(slow + v[t], abs=1e-5)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_the_score_is_paid_on_the_last_sampled_token() -> None:
    kl = torch.tensor([0.5, 0.1, 0.2, 0.3, 1.0, 1.0, 1.0, 1.0])  # of responses of 1, 3 and 4 tokens
    rewards = token_rewards([[(1, 2.0)], [(3, -1.0)], [(4, 3.0)]], kl, beta=0.1)
    expected = [1.95, -0.01, -0.02, -1.03, -0.1, -0.1, -0.1, 2.9]
    torch.testing.assert_close(rewards, torch.tensor(expected))


def test_whitening_spans_all_ranks_and_leaves_padding_out() -> None:
    ours, theirs = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([3.0, -2.0])
    everyone = torch.cat([ours, theirs])
    spread = merged([part_of(ours).tolist(), part_of(theirs).tolist()])
    assert (spread.count, spread.least, spread.greatest) == (5, -2.0, 6.0)
    expected = (ours - everyone.mean()) / everyone.std(unbiased=False)
    torch.testing.assert_close(whiten(ours, spread), expected)
    torch.testing.assert_close(whiten(ours, spread, shift_mean=False), expected + everyone.mean())


def test_k3_estimates_kl_with_the_right_sign() -> None:
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = float((policy * (policy / reference).log()).sum())
    k1, k3 = kl_k1(policy.log(), reference.log()), kl_k3(policy.log(), reference.log())
    assert float((policy * k1).sum()) == pytest.approx(exact, rel=1e-5)
    assert float((policy * k3).sum()) == pytest.approx(exact, rel=1e-5)
    assert bool((k3 >= 0).all())
    wrong_sign = (policy * (torch.expm1(k1) - k1)).sum()
    assert float(wrong_sign) == pytest.approx(exact + 0.0449, abs=1e-4)  # what trlX logs


def test_k3_stays_finite_where_the_policy_says_never() -> None:
    """It is clamped at a log-ratio of 20, and exact below."""
    k3 = kl_k3(torch.tensor([-300.0, -21.0]), torch.tensor([-1.0, -2.0]))
    assert k3.tolist() == pytest.approx([math.exp(20) - 21, math.exp(19) - 20], rel=1e-5)


def test_kl_controller_by_hand() -> None:
    controller = KLController(coefficient=0.05, target=6.0, horizon=10000)
    assert controller.updated(6.6, 448).coefficient == pytest.approx(0.05 * (1 + 0.1 * 0.0448))
    assert controller.updated(60.0, 448).coefficient == pytest.approx(0.05 * (1 + 0.2 * 0.0448))
    assert controller.updated(0.0, 448).coefficient == pytest.approx(0.05 * (1 - 0.2 * 0.0448))
    assert controller.updated(0.0, 10**9).coefficient == pytest.approx(0.04)
    assert KLController(0.05, None, 10000).updated(100.0, 448).coefficient == 0.05


def test_running_moments_are_those_of_all_scores() -> None:
    groups = [[1.0, 2.0, 4.0], [-3.0], [0.5, 0.5, 9.0, 1.0]]
    moments = RunningMoments()
    for group in groups:
        moments = moments.updated(group)
    everything = [score for group in groups for score in group]
    assert moments.mean == pytest.approx(statistics.fmean(everything))
    assert moments.std == pytest.approx(statistics.stdev(everything))
    assert RunningMoments().updated([2.0, 2.0]).std == 1.0  # nothing to scale by
    assert scale_of("running", None, moments) == moments.std
    assert scale_of("ref", 2.5, moments) == 2.5 and scale_of("none", None, moments) == 1.0
    assert clip_scores([-12.0, 3.0, 11.0], 10.0) == [-10.0, 3.0, 10.0]


def test_losses_by_hand() -> None:
    old = torch.zeros(4)
    ratios = torch.tensor([1.5, 1.5, 0.5, 1.1])
    advantages = torch.tensor([1.0, -1.0, -1.0, 2.0])
    # max(-A r, -A clip(r)): -1.2 (clipped), 1.5, 0.8 (clipped), -2.2
    values, old_values = torch.tensor([1.0, 0.1, 0.0, 0.0]), torch.zeros(4)
    returns = torch.tensor([2.0, 0.0, 0.0, 1.0])
    # clipped value of the first: 0.2, so its error is 1.8 and not 1.0
    tokens = Tokens(old, old, old_values, advantages, returns)
    loss = ppo_loss(ratios.log(), values, None, tokens, PPO(vf_coef=0.5), kl_weight=0.0)
    logged = dict(zip(SUMS, loss.sums.tolist(), strict=True))
    policy, value = -1.2 + 1.5 + 0.8 - 2.2, 0.5 * (1.8**2 + 0.01 + 0.0 + 1.0)
    assert loss.total.item() == pytest.approx(policy + 0.5 * value, abs=1e-6)
    assert logged["losses/policy_loss"] == pytest.approx(policy, abs=1e-6)
    assert logged["losses/value_loss"] == pytest.approx(value, abs=1e-6)
    assert logged["policy/clipfrac"] == 2 and logged["values/clipfrac"] == 1
    assert logged["ratio"] == pytest.approx(4.6)
    assert logged["policy/approx_kl"] == pytest.approx(sum(r - 1 - math.log(r) for r in (1.5, 1.5, 0.5, 1.1)), abs=1e-6)
    assert logged["values/values_error"] == pytest.approx(1.0 + 0.01 + 0.0 + 1.0)
    assert logged["values/mean"] == pytest.approx(1.1) and logged["values/squares"] == pytest.approx(1.01)
    assert loss.extremes.tolist() == [0.0, 1.0]


def test_learning_rate_is_a_function_of_the_step() -> None:
    settings = Optimizer(lr=1.0)
    rates = [learning_rate(step, settings, Scheduler(name="linear", warmup_steps=2), 6) for step in range(6)]
    assert rates == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert learning_rate(5, settings, Scheduler(), 6) == 1.0
    assert learning_rate(3, settings, Scheduler(name="cosine"), 6) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "rates"),
    [("linear", [1.0, 0.775, 0.55, 0.325, 0.1, 0.1]), ("cosine", [1.0, 0.8682, 0.55, 0.2318, 0.1, 0.1])],
)
def test_a_rate_ends_at_its_final_share_of_the_peak(name: Literal["linear", "cosine"], rates: list[float]) -> None:
    scheduler = Scheduler(name=name, final=0.1)
    assert [learning_rate(step, Optimizer(lr=2.0), scheduler, 4) / 2.0 for step in range(6)] == pytest.approx(
        rates, abs=1e-4
    )
    warm = Scheduler(name=name, final=0.5, warmup_steps=4)
    assert [learning_rate(step, Optimizer(lr=1.0), warm, 8) for step in (0, 3, 4, 8)] == [0.25, 1.0, 1.0, 0.5]
