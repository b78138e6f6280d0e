"""Rows that take over the places of others: nobody's answer depends on who was there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers_ppo import ARCHITECTURES, VOCAB, tiny_model, tokenizer
from torch import Tensor

from pipeline.config.training import Generate
from pipeline.training.decode import PREFILL_TOKENS, Response, decode, prefill_groups
from pipeline.training.split import Split, split_model
from pipeline.training.stopping import StopSequences

PROMPTS = [list(range(5 + row, 5 + row + length)) for row, length in enumerate((3, 17, 1, 9, 30, 4, 12, 2, 6))]
GENERATE = Generate(max_new_tokens=8, temperature=0.8)
NO_STOPS = StopSequences(tokenizer(), [])


def queued(split: Split, side_by_side: int | None, end: int, generate: Generate = GENERATE) -> list[Response]:
    noise = torch.Generator().manual_seed(5)
    return decode(split, PROMPTS, generate, NO_STOPS, end, noise, side_by_side=side_by_side)


def frequent_id(split: Split) -> int:
    """An id that ends some answers early when it is taken for EOS."""
    return queued(split, None, end=-1)[4].tokens[5]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_answers_are_the_same_however_many_are_decoded_side_by_side(kind: str) -> None:
    split = split_model(tiny_model(kind, spread=3.0), 1)
    end = frequent_id(split)
    together = queued(split, None, end)
    assert len({len(response.tokens) for response in together}) > 1
    for places in (1, 4):
        for response, expected in zip(queued(split, places, end), together, strict=True):
            assert (response.row, response.tokens, response.finish) == (expected.row, expected.tokens, expected.finish)
            torch.testing.assert_close(response.states, expected.states, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(response.logprobs, expected.logprobs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logprobs_and_states_are_those_of_a_float64_forward(kind: str) -> None:
    split = split_model(tiny_model(kind, spread=3.0), 1)
    responses = queued(split, 3, frequent_id(split))
    split.whole.double()
    for response in responses:
        ids = torch.tensor([response.prompt + response.tokens])
        with torch.no_grad():
            logits = split.whole(input_ids=ids[:, :-1], use_cache=False).logits[0, len(response.prompt) - 1 :]
            states = split.trunk(ids[:, :-1])[0]
        expected = (logits / GENERATE.temperature).log_softmax(-1).gather(-1, ids[0, len(response.prompt) :, None])
        torch.testing.assert_close(response.logprobs.double(), expected[:, 0], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(response.states.double(), states, atol=2e-5, rtol=1e-4)


def test_top_k_does_not_enter_log_probabilities() -> None:
    split = split_model(tiny_model(spread=3.0), 1)
    for response in queued(split, 4, -1, Generate(max_new_tokens=5, top_k=2)):
        ids = torch.tensor([response.prompt + response.tokens])
        with torch.no_grad():
            logits = split.whole(input_ids=ids[:, :-1], use_cache=False).logits[0, len(response.prompt) - 1 :]
            table = logits.log_softmax(-1)
        assert ((logits > logits.gather(-1, ids[0, len(response.prompt) :, None])).sum(-1) < 2).all()
        expected = table.gather(-1, ids[0, len(response.prompt) :, None]).squeeze(-1)
        torch.testing.assert_close(response.logprobs, expected, atol=1e-5, rtol=1e-5)


def test_a_repetition_gives_the_same_bits() -> None:
    split = split_model(tiny_model(spread=3.0), 1)
    end = frequent_id(split)
    for first, second in zip(queued(split, 4, end), queued(split, 4, end), strict=True):
        assert first.tokens == second.tokens
        assert torch.equal(first.states, second.states) and torch.equal(first.logprobs, second.logprobs)


def test_no_row_computes_after_its_end_and_free_places_are_filled() -> None:
    split = split_model(tiny_model(spread=3.0), 1)
    end = frequent_id(split)
    columns, admitted, sampled = [0], [0], []  # positions that went through the trunk, prompts let in, rows at a step

    def count(_: object, inputs: tuple[Tensor, None]) -> None:
        real = inputs[0].numel() if inputs[1] is None else len(inputs[0])
        columns[0] += real
        admitted[0] += len(inputs[0]) if inputs[1] is None else 0

    def note(logits: Tensor, hidden: Tensor) -> Tensor:
        sampled.append((len(hidden), admitted[0]))
        return logits

    split.trunk.register_forward_pre_hook(count)
    noise = torch.Generator().manual_seed(5)
    responses = decode(split, PROMPTS, GENERATE, NO_STOPS, end, noise, side_by_side=4, adjust=note)
    tokens = sum(len(response.tokens) for response in responses)
    assert sum(rows for rows, _ in sampled) == tokens
    assert columns[0] == sum(map(len, PROMPTS)) + tokens - len(PROMPTS)  # the last id of a row is fed to nobody
    assert all(rows == 4 for rows, let_in in sampled if let_in < len(PROMPTS))


def test_a_row_that_ends_with_its_first_id_makes_room_at_once() -> None:
    split = split_model(tiny_model(spread=3.0), 1)
    firsts = [response.tokens[0] for response in queued(split, None, end=-1)]
    responses = queued(split, 1, end=firsts[4])  # row 4 has the longest prompt: it comes first
    assert responses[4].tokens == [firsts[4]] and responses[4].states.shape[0] == len(PROMPTS[4])
    assert [response.tokens[0] for response in responses] == firsts


def test_a_stop_leaves_the_answers_that_have_ended() -> None:
    split = split_model(tiny_model(spread=3.0), 1)
    asked: Iterator[bool] = iter([False, True])  # looked at every eighth step
    noise = torch.Generator().manual_seed(5)
    stop = lambda: next(asked)  # noqa: E731
    some = decode(split, PROMPTS, GENERATE, NO_STOPS, -1, noise, side_by_side=3, stop=stop)
    assert [response.row for response in some] == [1, 4, 6]  # the three longest prompts, at their limit
    assert all(len(response.tokens) == GENERATE.max_new_tokens for response in some)


def test_adjusted_scores_are_what_is_sampled() -> None:
    split = split_model(tiny_model(spread=3.0), 1)
    seen = []

    def only_seven(logits: Tensor, hidden: Tensor) -> Tensor:
        torch.testing.assert_close(split.top.head(hidden), logits)
        seen.append(len(hidden))
        return logits.masked_fill(torch.arange(VOCAB) != 7, -torch.inf)

    noise = torch.Generator().manual_seed(5)
    for response in decode(split, PROMPTS, GENERATE, NO_STOPS, -1, noise, side_by_side=4, adjust=only_seven):
        assert set(response.tokens) == {7} and not response.logprobs.any()
    assert sum(seen) == len(PROMPTS) * GENERATE.max_new_tokens


def test_prompts_of_like_length_are_run_together() -> None:
    assert prefill_groups([80, 72, 70, 60, 60, 8]) == [[0, 1, 2], [3, 4], [5]]
    assert prefill_groups([PREFILL_TOKENS + 1, PREFILL_TOKENS // 2, PREFILL_TOKENS // 2, 1]) == [[0], [1, 2], [3]]
    assert prefill_groups([PREFILL_TOKENS // 2] * 3) == [[0, 1], [2]]
