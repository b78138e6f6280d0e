"""PPO's options, each against numbers worked out by hand or in float64."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from helpers_ppo import tiny_model
from helpers_update import ALONE, SCORES, phase, settings, trained, updater
from torch import Tensor

from pipeline.config.methods import PPO
from pipeline.training.advantages import ESTIMATORS, grpo, rloo
from pipeline.training.baselines import baselines_cancel
from pipeline.training.control import RunningMoments, scale_of
from pipeline.training.dense import Scores, shaped
from pipeline.training.losses import SUMS, Tokens, ppo_loss
from pipeline.training.microbatches import Limits
from pipeline.training.prompts import all_prompts, phase_prompts
from pipeline.training.split import split_model
from pipeline.training.update import Experience, Targets, targets_of

WHOLE = Limits(4)


@pytest.fixture(scope="module")
def exp() -> Experience:
    """Of a policy that has moved away from its reference, with values that say something."""
    found = phase(split_model(tiny_model(spread=3.0), 1), WHOLE)[3]
    noise = torch.Generator().manual_seed(5)
    return Experience(
        found.responses,
        found.packing,
        found.logprobs,
        found.logprobs + 0.3 * torch.randn(found.logprobs.shape, generator=noise),
        torch.randn(found.logprobs.shape, generator=noise),
        found.entropy,
    )


def of(exp: Experience, **more: object) -> Targets:
    return targets_of(exp, SCORES, 0.1, settings(**more), ALONE)


def by_rows(exp: Experience, packed: Tensor) -> list[list[float]]:
    return [row.tolist() for row in torch.split(packed.double(), exp.packing.lengths)]


EXACT: dict[str, Callable[[float], float]] = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: log_ratio**2 / 2,
    "k3": lambda log_ratio: 2.718281828459045**-log_ratio - 1 + log_ratio,
}


@pytest.mark.parametrize("kind", EXACT)
def test_the_penalty_in_the_reward_is_the_chosen_estimator(exp: Experience, kind: str) -> None:
    """With gamma = lam = 1 a token's return is the sum of the rewards from it on."""
    returns = by_rows(exp, of(exp, kl_estimator=kind, lam=1.0).returns)
    log_ratios = by_rows(exp, exp.logprobs.double() - exp.reference.double())
    for row, score in enumerate(SCORES):
        rewards = [-0.1 * EXACT[kind](log_ratio) for log_ratio in log_ratios[row]]
        rewards[-1] += score
        expected = [sum(rewards[place:]) for place in range(len(rewards))]
        assert returns[row] == pytest.approx(expected, abs=1e-5)


def test_a_kl_in_the_loss_is_not_paid_as_reward(exp: Experience) -> None:
    targets = of(exp, kl_placement="loss", kl_estimator="k3", lam=1.0)
    assert targets.kl_weight == 0.1
    for row, score in enumerate(SCORES):
        assert by_rows(exp, targets.returns)[row] == pytest.approx([score] * exp.packing.lengths[row], abs=1e-6)
    assert of(exp).kl_weight == 0.0


def tokens_at(logprobs: Tensor, reference: Tensor) -> Tokens:
    """Tokens whose policy loss has no gradient: their advantages are 0."""
    nothing = torch.zeros_like(reference)
    return Tokens(logprobs.detach(), reference, nothing, nothing, nothing)


SLOPES: dict[str, Callable[[float], float]] = {
    "k2": lambda log_ratio: log_ratio,
    "k3": lambda log_ratio: 1 - 2.718281828459045**-log_ratio,
}


@pytest.mark.parametrize("kind", SLOPES)
def test_a_kl_in_the_loss_has_the_estimators_gradient(kind: str) -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    reference = torch.tensor([-1.5, -1.0, -0.5])
    tokens = tokens_at(logprobs, reference)
    ppo = settings(kl_estimator=kind, kl_placement="loss")
    loss = ppo_loss(logprobs, torch.zeros(3), None, tokens, ppo, kl_weight=0.25)
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert logprobs.grad is not None
    expected = [0.25 * SLOPES[kind](log_ratio) for log_ratio in (0.5, -1.0, 0.0)]
    assert logprobs.grad.tolist() == pytest.approx(expected, abs=1e-6)
    assert loss.sums[SUMS.index("losses/kl")].item() == pytest.approx(
        sum(EXACT[kind](log_ratio) for log_ratio in (0.5, -1.0, 0.0)), abs=1e-6
    )


def test_k2_in_the_loss_has_the_exact_gradient_of_the_kl() -> None:
    """Its mean over samples, by enumeration of a vocabulary, against autograd through the closed form."""
    logits = torch.tensor([0.3, -1.0, 0.7, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.5, -0.2, 0.0], dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    [exact] = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    for kind, same in (("k2", True), ("k1", False), ("k3", False)):
        sampled = (policy.exp().detach() * ESTIMATORS[kind](policy, reference)).sum()
        [found] = torch.autograd.grad(sampled, logits, retain_graph=True)
        assert torch.allclose(found, exact, atol=1e-12) is same
        if kind == "k1":
            assert found.abs().max() < 1e-12  # why it is refused


def test_whitened_rewards_keep_their_mean(exp: Experience) -> None:
    plain, white = of(exp, lam=1.0), of(exp, lam=1.0, whiten_rewards=True)

    def rewards(targets: Targets) -> list[float]:
        rows = by_rows(exp, targets.returns)
        return [now - after for row in rows for now, after in zip(row, [*row[1:], 0.0], strict=True)]

    before, after = rewards(plain), rewards(white)
    mean, std = statistics.fmean(before), statistics.pstdev(before)
    assert after == pytest.approx([(reward - mean) / std + mean for reward in before], abs=1e-4)


def test_rloo_and_grpo_by_hand() -> None:
    returns = torch.tensor([1.0, 3.0, 8.0, 5.0, 5.0, 5.0])
    torch.testing.assert_close(rloo(returns, 3), torch.tensor([1 - 5.5, 3 - 4.5, 8 - 2.0, 0.0, 0.0, 0.0]))
    std = statistics.stdev([1.0, 3.0, 8.0])
    torch.testing.assert_close(grpo(returns, 3), torch.tensor([-3 / std, -1 / std, 4 / std, 0.0, 0.0, 0.0]))


def test_returns_that_differ_by_rounding_alone_are_equal_to_grpo() -> None:
    near = torch.tensor([0.1, 0.1, 0.1 + 2**-27, 3.0, 3.0, 3.0])
    assert near[0] != near[2] and grpo(near, 3).tolist() == [0.0] * 6
    assert grpo(torch.full((7,), 0.1), 7).tolist() == [0.0] * 7  # whose mean in float32 is not 0.1


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_a_groups_answers_are_compared_by_score_less_kl(exp: Experience, kind: str) -> None:
    targets = of(exp, advantage=kind, group_size=4)
    log_ratios = by_rows(exp, exp.logprobs.double() - exp.reference.double())
    returns = [score - 0.1 * sum(row) for score, row in zip(SCORES, log_ratios, strict=True)]
    for row, found in enumerate(by_rows(exp, targets.advantages)):
        group = returns[row // 4 * 4 : row // 4 * 4 + 4]
        others = [each for place, each in enumerate(group) if place != row % 4]
        expected = returns[row] - statistics.fmean(others)
        if kind == "grpo":
            expected = (returns[row] - statistics.fmean(group)) / statistics.stdev(group)
        assert found == pytest.approx([expected] * exp.packing.lengths[row], abs=1e-4)
    assert "values/explained_variance" not in targets.figures


BASELINES = [0.7, -2.5]
"""Of two prompts, with four answers each."""


def shaped_targets(exp: Experience, ppo: PPO, baselines: list[float]) -> Tensor:
    """A phase's advantages where scores are measured from these."""
    scores = [
        shaped(Scores(score, []), baselines[row // 4], ppo.cliprange_reward, penalty=0.5 * (row == 3)).whole
        for row, score in enumerate(SCORES)
    ]
    scale = scale_of(ppo.scale_reward, ppo.ref_std, RunningMoments().updated(scores))
    return targets_of(exp, [score / scale for score in scores], 0.1, ppo, ALONE).advantages


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
@pytest.mark.parametrize(
    ("more", "cancels"),
    [
        ({"scale_reward": "none", "cliprange_reward": None}, True),
        ({"scale_reward": "ref", "ref_std": 0.5, "cliprange_reward": None}, True),
        ({"scale_reward": "none", "cliprange_reward": 1.5}, False),  # a delta of 1 + 2.5 is cut, one of -1 + 2.5 is not
        ({"scale_reward": "running", "cliprange_reward": None}, False),
    ],
)
def test_baselines_cancel_exactly_where_that_is_said(
    exp: Experience, kind: str, more: dict[str, object], cancels: bool
) -> None:
    ppo = settings(advantage=kind, group_size=4, **more)
    assert baselines_cancel(ppo) is cancels
    with_them, without = shaped_targets(exp, ppo, BASELINES), shaped_targets(exp, ppo, [0.0, 0.0])
    assert torch.allclose(with_them, without, atol=1e-5) is cancels


def test_a_value_function_learns_from_the_baselines(exp: Experience) -> None:
    ppo = settings(scale_reward="none", cliprange_reward=None)
    assert not baselines_cancel(ppo)
    assert not torch.allclose(shaped_targets(exp, ppo, BASELINES), shaped_targets(exp, ppo, [0.0, 0.0]), atol=1e-2)


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_without_a_value_function_its_head_stays_as_it_was(kind: str) -> None:
    ppo = settings(advantage=kind, group_size=4)
    policy = phase(split_model(tiny_model(spread=3.0), 1), WHOLE)[0]
    weights, row = trained(WHOLE, ppo)
    for name, before in policy.value.state_dict().items():
        assert torch.equal(weights[f"value.{name}"], before)
    assert not [name for name in row if name.startswith("values/") or name == "losses/value_loss"]
    assert row["losses/total_loss"] == row["losses/policy_loss"]


def test_groups_are_side_by_side_and_on_one_rank() -> None:
    ranks = [phase_prompts(3, rank, 2, 6, 100, seed=1, group=3) for rank in (0, 1)]
    for rows in ranks:
        assert rows[0] == rows[1] == rows[2] != rows[3] == rows[4] == rows[5]
    alone = phase_prompts(3, 0, 1, 12, 100, seed=1, group=3)
    assert sorted(ranks[0] + ranks[1]) == sorted(alone)
    used = {row for step in range(4) for rank in (0, 1) for row in phase_prompts(step, rank, 2, 6, 100, 1, 3)}
    assert all_prompts(4, 2, 6, 100, seed=1, group=3) == sorted(used)


def test_the_entropy_bonus_raises_entropy() -> None:
    """Its gradient is that of the mean entropy: advantages of 0 leave nothing else to follow."""
    entropies = []
    for coefficient in (0.0, 5.0):
        ppo = settings(entropy_coef=coefficient, vf_coef=0.0)
        policy, _, plans, exp = phase(split_model(tiny_model(spread=3.0), 1), WHOLE)
        nothing = torch.zeros_like(exp.logprobs)
        _, row = updater(policy, ppo).run(exp, Targets(nothing, nothing), plans, 0, 4)
        again = phase_entropy(policy, exp)
        entropies.append(again)
        assert ("losses/entropy" in row) == bool(coefficient)
        if coefficient:
            assert row["losses/total_loss"] == pytest.approx(-5.0 * row["losses/entropy"], abs=1e-6)
    before = float(exp.entropy.mean())
    assert entropies[0] == pytest.approx(before, abs=1e-6)
    assert entropies[1] > before + 0.01


def phase_entropy(policy: torch.nn.Module, exp: Experience) -> float:
    """The mean entropy of the policy as it is now, on the same tokens, from whole tables in float64."""
    total = 0.0
    with torch.no_grad():
        for response in exp.responses:
            hidden = policy.top.part(response.states[None])[0, len(response.prompt) - 1 :]  # type: ignore[operator, union-attr]
            table = policy.top.head(hidden).double().div(0.7).log_softmax(-1)  # type: ignore[operator, union-attr]
            total -= float((table.exp() * table).sum())
    return total / len(exp.logprobs)


def test_a_term_of_weight_zero_is_absent() -> None:
    plain, row = trained(WHOLE, PPO(num_rollouts=8, chunk_size=8, ppo_epochs=2))
    assert "losses/kl" not in row and "losses/entropy" not in row
    assert row["losses/total_loss"] == pytest.approx(row["losses/policy_loss"] + row["losses/value_loss"])
    assert plain
