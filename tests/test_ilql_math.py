"""ILQL's losses, targets and heads, against values that are worked out by hand or in float64 by other means."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.training.ilql_heads import Heads, TargetHeads
from pipeline.training.ilql_losses import (
    MAX_EXPONENT,
    awac_weights,
    expectile_loss,
    ilql_terms,
    q_targets,
    td_loss,
    total_loss,
)

ONE_ROW = torch.tensor([False, False, True])


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_heads(hidden: int = 6, vocab: int = 11, two_qs: bool = True) -> Heads:
    """Heads whose last layers are not at zero any more."""
    heads = Heads(hidden, vocab, two_qs, seed=0).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return heads


def test_a_q_target_is_the_reward_and_the_discounted_value_behind_the_action() -> None:
    targets = q_targets(numbers(0, 0, 1), numbers(0.5, -0.25, 0.75), ONE_ROW, gamma=0.9)
    assert targets.tolist() == pytest.approx([0.9 * -0.25, 0.9 * 0.75, 1.0])


def test_no_value_flows_from_one_row_into_the_one_before() -> None:
    last = torch.tensor([False, True, True])
    targets = q_targets(numbers(0, 1, -1), numbers(0.5, -0.25, 100.0), last, gamma=0.9)
    assert targets.tolist() == pytest.approx([0.9 * -0.25, 1.0, -1.0])


def test_targets_and_weights_carry_no_gradient() -> None:
    values = numbers(0.5, -0.25, 0.75).requires_grad_()
    assert not q_targets(numbers(0, 0, 1), values, ONE_ROW, 0.9).requires_grad
    assert not awac_weights(numbers(1, 1, 1), values, 2.0).requires_grad


def test_td_loss_sums_both_heads_squares() -> None:
    q = torch.stack([numbers(1.0, 0.0), numbers(0.5, -1.0)])
    assert float(td_loss(q, numbers(0.0, 1.0))) == pytest.approx(1 + 1 + 0.25 + 4)


def test_expectile_loss_by_hand() -> None:
    # Q above V weighs tau, below 1 - tau: 0.6 * 2^2 + 0.4 * 1^2
    assert float(expectile_loss(numbers(2.0, -1.0), numbers(0.0, 0.0), tau=0.6)) == pytest.approx(2.4 + 0.4)


@pytest.mark.parametrize("tau", [0.5, 0.9])
def test_v_minimises_the_loss_at_the_expectile(tau: float) -> None:
    """An expectile balances weighted deviations: tau * sum(Q - V over V) = (1 - tau) * sum(V - Q under V)."""
    q = numbers(-1.0, 0.2, 0.4, 3.0)
    value = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([value], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-14)

    def loss() -> Tensor:
        optimizer.zero_grad()
        result = expectile_loss(q, value.expand(4), tau)
        result.backward()  # type: ignore[no-untyped-call]
        return result

    optimizer.step(loss)  # type: ignore[arg-type]
    above, below = (q - value).clamp(min=0).sum().item(), (value - q).clamp(min=0).sum().item()
    assert tau * above == pytest.approx((1 - tau) * below, rel=1e-6)
    if tau == 0.5:
        assert value.item() == pytest.approx(q.mean().item())


def test_weights_grow_with_the_advantage_and_are_cut() -> None:
    weights = awac_weights(numbers(1.0, 0.0, 1000.0), numbers(0.5, 0.5, 0.0), beta=2.0)
    assert weights.tolist() == pytest.approx([math.e, 1 / math.e, math.exp(MAX_EXPONENT)])
    assert awac_weights(numbers(1.0, -7.0), numbers(0.5, 0.5), beta=0.0).tolist() == [1.0, 1.0]


def test_all_terms_by_hand() -> None:
    terms = ilql_terms(
        q=torch.stack([numbers(0.0, 0.5), numbers(1.0, 1.0)]),
        target_q=numbers(0.5, -0.5),
        values=numbers(0.0, 1.0),
        q_nll=torch.stack([numbers(2.0, 1.0), numbers(0.5, 0.25)]),
        lm_nll=numbers(3.0, 4.0),
        rewards=numbers(0.0, -1.0),
        last=torch.tensor([False, True]),
        tau=0.7,
        gamma=0.5,
        beta=1.0,
    )
    # Targets are 0.5 * V(1) = 0.5 and the reward, -1.
    assert float(terms.q) == pytest.approx((0.5**2 + 1.5**2) + (0.5**2 + 2.0**2))
    assert float(terms.v) == pytest.approx(0.7 * 0.5**2 + 0.3 * 1.5**2)
    assert float(terms.cql) == pytest.approx(3.75)
    assert float(terms.awac) == pytest.approx(3.0 * math.exp(0.5) + 4.0 * math.exp(-1.5))
    total = terms.q + terms.v + 0.1 * terms.cql + 2 * terms.awac
    assert float(total_loss(terms, cql_scale=0.1, awac_scale=2.0)) == pytest.approx(float(total))


def test_heads_have_trlx_shapes_and_start_at_zero() -> None:
    heads = Heads(6, 11, two_qs=True, seed=3)
    shapes = {name: tuple(weight.shape) for name, weight in heads.state_dict().items()}
    assert shapes["q_heads.0.0.weight"] == shapes["v_head.0.weight"] == (12, 6)
    assert shapes["q_heads.1.2.weight"] == (11, 12)
    assert shapes["v_head.2.weight"] == (1, 12)
    assert len(Heads(6, 11, two_qs=False, seed=3).q_heads) == 1
    hidden, actions = torch.randn(4, 6), torch.tensor([0, 3, 10, 3])
    assert heads.taken(hidden, actions).abs().max() == 0 == heads.values(hidden).abs().max()
    assert not torch.equal(heads.q_heads[0][0].weight, heads.q_heads[1][0].weight)  # type: ignore[index]


def test_taken_values_and_entropies_are_those_of_all_outputs() -> None:
    heads = random_heads()
    hidden, actions = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 3, 10, 3])
    outputs = torch.stack([head(hidden) for head in heads.q_heads])  # (heads, n, V), which training never makes
    q, nll = heads.taken_and_nll(hidden, actions)
    rows = torch.arange(4)
    torch.testing.assert_close(q, outputs[:, rows, actions])
    torch.testing.assert_close(nll[1], F.cross_entropy(outputs[1], actions, reduction="none"))
    torch.testing.assert_close(TargetHeads(heads).smallest_taken(hidden, actions), outputs.amin(0)[rows, actions])


def test_the_heads_gradients_are_those_of_all_outputs() -> None:
    heads = random_heads()
    hidden = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    actions, weights = torch.tensor([0, 3, 10, 3]), numbers(1.0, -2.0, 0.5, 3.0)

    def gradients(q: Tensor, nll: Tensor) -> list[Tensor]:
        loss = (weights * (q + 0.3 * nll.square())).sum()
        return list(torch.autograd.grad(loss, [hidden, *heads.q_heads.parameters()]))

    found = gradients(*heads.taken_and_nll(hidden, actions))
    logprobs = torch.stack([head(hidden) for head in heads.q_heads])
    index = actions.expand(2, 4)[..., None]
    q = logprobs.gather(-1, index).squeeze(-1)
    expected = gradients(q, -logprobs.log_softmax(-1).gather(-1, index).squeeze(-1))
    torch.testing.assert_close(found, expected)


def test_target_heads_follow_by_polyak_averaging_at_every_synchronisation() -> None:
    """k synchronisations with a trained weight at w leave the target at w + (1 - alpha)^k (w0 - w)."""
    heads, alpha, steps = random_heads(), 0.1, 7
    targets = TargetHeads(heads)
    start = [parameter.clone() for parameter in targets.q_heads.parameters()]
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(1.0)
    for _ in range(steps):
        targets.sync(heads, alpha)
    moved = 1 - (1 - alpha) ** steps
    for before, after in zip(start, targets.q_heads.parameters(), strict=True):
        torch.testing.assert_close(after, before + moved)
        assert not after.requires_grad


def test_target_heads_stay_wide_where_the_trained_ones_are_bf16() -> None:
    """A synchronisation of trlX's alpha, 1e-4, is below what bf16 can tell from 1."""
    heads = random_heads().bfloat16()
    targets = TargetHeads(heads)
    before = next(targets.q_heads.parameters()).clone()
    with torch.no_grad():
        next(heads.q_heads.parameters()).add_(1.0)
    targets.sync(heads, 1e-4)
    assert before.dtype == torch.float32
    torch.testing.assert_close(
        next(targets.q_heads.parameters()) - before, torch.full_like(before, 1e-4), atol=2e-6, rtol=0
    )
