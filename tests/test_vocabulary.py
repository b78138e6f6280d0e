"""Log-probabilities and entropies in chunks, against float64 and finite differences."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, distributed, nn

from pipeline.training.vocabulary import token_logprobs

VOCABULARY, WIDTH, POSITIONS = 11, 5, 7


def head_and_states(dtype: torch.dtype) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, dtype=dtype)
    states = 2.0 * torch.randn(POSITIONS, WIDTH, dtype=dtype)
    return head, states.requires_grad_(), torch.tensor([3, 0, 10, 3, 5, 7, 1])


def full(head: nn.Linear, states: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The textbook's way, all in float64."""
    table = (states.double() @ head.weight.double().T + head.bias.double()).div(temperature).log_softmax(dim=-1)
    return table[torch.arange(len(targets)), targets], -(table.exp() * table).sum(dim=-1)


@pytest.mark.parametrize("positions", [1, 3, 7], ids=lambda positions: f"{positions}-at-a-time")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_give_the_full_tables_numbers_and_gradients(positions: int, temperature: float) -> None:
    head, states, targets = head_and_states(torch.float32)
    weights = torch.linspace(-1, 2, POSITIONS)
    logprobs, entropy = token_logprobs(head, states, targets, temperature, True, positions * VOCABULARY)
    expected, expected_entropy = full(head, states, targets, temperature)
    assert entropy is not None
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=1e-6, rtol=1e-6)
    parameters = (states, head.weight, head.bias)
    ours = torch.autograd.grad((weights * logprobs + weights.flip(0) * entropy).sum(), parameters)
    theirs = torch.autograd.grad((weights * expected + weights.flip(0) * expected_entropy).sum(), parameters)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_entropy", [False, True], ids=["logprobs", "and-entropy"])
def test_the_backward_pass_agrees_with_finite_differences(with_entropy: bool) -> None:
    head, states, targets = head_and_states(torch.float64)

    def outputs(states: Tensor) -> tuple[Tensor, ...]:
        found = token_logprobs(head, states, targets, 0.7, with_entropy)
        return tuple(part for part in found if part is not None)

    assert torch.autograd.gradcheck(outputs, (states,))


class CountingHead(nn.Linear):
    """Remembers how many positions it was asked for at a time, and which logits it made."""

    def __init__(self) -> None:
        super().__init__(WIDTH, VOCABULARY)
        self.asked: list[int] = []
        self._made: list[weakref.ref[Tensor]] = []

    def forward(self, states: Tensor) -> Tensor:
        self.asked.append(len(states))
        logits = super().forward(states)
        self._made.append(weakref.ref(logits))
        return logits

    def alive(self) -> int:
        """How many of the logit tensors still exist."""
        return sum(made() is not None for made in self._made)


def test_logits_are_made_chunk_by_chunk_and_again_for_the_gradient() -> None:
    head, (_, states, targets) = CountingHead(), head_and_states(torch.float32)
    logprobs, _ = token_logprobs(head, states, targets, 1.0, False, 3 * VOCABULARY)
    assert head.asked == [3, 2, 2] and head.alive() == 0
    logprobs.sum().backward()  # type: ignore[no-untyped-call]
    assert sorted(head.asked) == [2, 2, 2, 2, 3, 3]


def test_all_ranks_call_a_head_that_is_spread_over_them_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call gathers the weight: a rank with fewer positions takes as many, smaller, chunks."""

    def the_other_rank_needs_four(most: Tensor, op: object) -> None:
        most.clamp_(min=4)

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "all_reduce", the_other_rank_needs_four)
    head, (plain, states, targets) = CountingHead(), head_and_states(torch.float32)
    head.load_state_dict(plain.state_dict())
    head.weight.ds_id = 0  # as DeepSpeed marks it
    logprobs, _ = token_logprobs(head, states, targets, 1.0, False, 3 * VOCABULARY)
    assert head.asked == [2, 2, 2, 1]
    torch.testing.assert_close(logprobs.double(), full(plain, states, targets, 1.0)[0], atol=1e-6, rtol=1e-6)


def test_positions_that_fit_are_computed_once() -> None:
    head, (_, states, targets) = CountingHead(), head_and_states(torch.float32)
    logprobs, _ = token_logprobs(head, states, targets, 1.0, False, POSITIONS * VOCABULARY)
    assert head.alive() == 1  # kept for the backward pass
    logprobs.sum().backward()  # type: ignore[no-untyped-call]
    assert head.asked == [POSITIONS]


def test_half_precision_logits_are_summed_in_float32() -> None:
    head, states, targets = head_and_states(torch.bfloat16)
    logprobs, entropy = token_logprobs(head, states, targets, 1.0, True)
    assert entropy is not None and logprobs.dtype == entropy.dtype == torch.float32
    table = head(states).double().log_softmax(dim=-1)
    torch.testing.assert_close(logprobs.double(), table[torch.arange(POSITIONS), targets], atol=1e-5, rtol=1e-5)
    logprobs.sum().backward()  # type: ignore[no-untyped-call]
    assert states.grad is not None and states.grad.dtype == torch.bfloat16
