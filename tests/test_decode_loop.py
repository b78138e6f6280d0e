"""The decode loop against a slow one: a row at a time, the whole model each step, no cache, no padding."""

from __future__ import annotations

import pytest
import torch
from helpers_ppo import ARCHITECTURES, VOCAB, tiny_model, tokenizer
from torch import Tensor

from pipeline.config.training import Generate
from pipeline.data.tokens import encode
from pipeline.training.decode import Response, decode
from pipeline.training.sampling import keep_likely, luck_of, sample
from pipeline.training.split import split_model
from pipeline.training.stopping import StopSequences, decode_text

PROMPTS = [[5, 9, 200], [7], [11, 12, 13, 14, 15, 16, 17], [40, 41], [99, 98, 97, 96]]
NO_STOPS = StopSequences(tokenizer(), [])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def slow_decode(model: torch.nn.Module, prompts: list[list[int]], generate: Generate, end: int) -> list[list[int]]:
    luck = torch.rand(len(prompts), generate.max_new_tokens, dtype=torch.float64, generator=generator())
    results = []
    for row, prompt in enumerate(prompts):
        tokens: list[int] = []
        while len(tokens) < generate.max_new_tokens and (not tokens or tokens[-1] != end):
            with torch.no_grad():
                logits: Tensor = model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1]
            reached = (logits.double() / generate.temperature).softmax(-1).cumsum(-1) > luck[row, len(tokens)]
            tokens.append(int(reached.nonzero()[0]))
        results.append(tokens)
    return results


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_are_sampled_as_if_each_were_alone(kind: str) -> None:
    model = tiny_model(kind, spread=3.0)
    generate = Generate(max_new_tokens=10, temperature=0.8)
    expected = slow_decode(model, PROMPTS, generate, end=-1)
    end = expected[0][3]  # some rows end early, at different steps
    expected = slow_decode(model, PROMPTS, generate, end)
    responses = decode(split_model(model, 1), PROMPTS, generate, NO_STOPS, end, generator())
    assert [response.tokens for response in responses] == expected
    assert [response.finish for response in responses] == ["eos" if end in t else "length" for t in expected]
    assert len({len(tokens) for tokens in expected}) > 1


def test_states_are_those_of_one_forward_over_prompt_and_response() -> None:
    split = split_model(tiny_model(spread=3.0), 1)
    for response in decode(split, PROMPTS, Generate(max_new_tokens=6), NO_STOPS, 0, generator()):
        ids = torch.tensor([response.prompt + response.tokens[:-1]])
        with torch.no_grad():
            torch.testing.assert_close(response.states, split.trunk(ids)[0], atol=1e-5, rtol=1e-4)


def test_finished_rows_are_told_at_once_and_each_once() -> None:
    told: list[list[int]] = []
    split = split_model(tiny_model(spread=3.0), 1)
    generate = Generate(max_new_tokens=8)
    end = slow_decode(split.whole, PROMPTS, generate, end=-1)[1][2]

    def tell(finished: list[Response]) -> None:
        told.append([response.row for response in finished])

    responses = decode(split, PROMPTS, generate, NO_STOPS, end, generator(), on_finished=tell)
    assert sorted(row for rows in told for row in rows) == [0, 1, 2, 3, 4]
    lengths = [len(responses[rows[0]].tokens) for rows in told]
    assert lengths == sorted(lengths) and len(told) > 1


def scripted(ids: list[int]) -> torch.nn.Module:
    """A model that says `ids` one after the other, whatever it reads: position p predicts ids[p]."""
    model = tiny_model()
    split = split_model(model, 1)

    class Head(torch.nn.Module):
        step = 0

        def forward(self, hidden: Tensor) -> Tensor:
            logits = torch.full((len(hidden), VOCAB), -1e9)
            logits[:, ids[min(self.step, len(ids) - 1)]] = 0.0
            self.step += 1
            return logits

    split.top.head = Head()
    return split  # type: ignore[return-value]


@pytest.mark.parametrize("said", [" Fine.\n\nHuman: more", " Yes Assistant: and", "Human:", "xHuman:"])
def test_a_stop_sequence_ends_the_row_on_the_id_that_completes_it(said: str) -> None:
    ids = encode(tokenizer(), said + " and on")
    stops = StopSequences(tokenizer(), ["Human:", "human:", "Assistant:", "assistant:"])
    [response] = decode(scripted(ids), [[5]], Generate(max_new_tokens=40), stops, 0, generator())  # type: ignore[arg-type]
    assert response.finish == "stop"
    assert response.tokens == ids[: len(response.tokens)]
    text = decode_text(tokenizer(), response.tokens)
    assert stops.find(text) is not None and stops.find(decode_text(tokenizer(), response.tokens[:-1])) is None


def test_without_eos_and_stop_a_row_runs_to_its_limit() -> None:
    ids = encode(tokenizer(), " on and on and on and on")
    [response] = decode(scripted(ids), [[5]], Generate(max_new_tokens=5), NO_STOPS, 0, generator())  # type: ignore[arg-type]
    assert response.finish == "length" and response.tokens == ids[:5]


def test_sampling_follows_the_softmax() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(20000, -1)
    tokens, told = sample(logits, luck_of(20000, 1, generator())[:, 0], Generate())
    torch.testing.assert_close(told, logits[0][tokens])
    shares = tokens.bincount(minlength=3) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.01, rtol=0.0)


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    scores = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    kept = lambda k, p: keep_likely(scores, k, p).isfinite().nonzero()[:, 1].tolist()  # noqa: E731
    assert kept(2, 1.0) == [1, 3]
    assert kept(0, 0.39) == [1]
    assert kept(0, 0.5) == [1, 3]
    assert kept(0, 0.75) == [1, 2, 3]
    assert kept(3, 0.5) == [1, 3]  # of the renormalised three: 4/9, 3/9, 2/9
