"""What the reward model is asked about a response."""

from __future__ import annotations

import pytest
import torch
from helpers_ppo import HashScorer, tokenizer

from pipeline.data.embedded import build_tokenizer
from pipeline.data.tokens import encode
from pipeline.training.decode import Finish, Response
from pipeline.training.rollout import PendingScores
from pipeline.training.scoring_text import ScoringText
from pipeline.training.stopping import StopSequences

PROMPT = "\n\nHuman: Hello\n\nAssistant:"
END = tokenizer().eos_token_id


def scoring(same: bool = True, max_length: int = 200) -> ScoringText:
    stops = StopSequences(tokenizer(), ["Human:", "Assistant:"])
    reward = tokenizer() if same else build_tokenizer([PROMPT], 270, 128)
    return ScoringText(tokenizer(), reward, same, stops, max_length)


def response(tokens: list[int], finish: Finish) -> Response:
    return Response(0, encode(tokenizer(), PROMPT), tokens, finish, torch.empty(0), torch.empty(0))


def test_an_ended_response_is_scored_as_it_was_sampled() -> None:
    odd = [*[encode(tokenizer(), letter)[0] for letter in " Sure"], END]  # not how the tokenizer would write it
    assert scoring().sequence(PROMPT, response(odd, "eos")) == encode(tokenizer(), PROMPT) + odd


def test_a_stop_sequence_is_cut_and_eos_put_behind() -> None:
    said = encode(tokenizer(), " Sure.\n\nHuman:")
    text = scoring()
    assert text.text(response(said, "stop")) == " Sure."
    assert text.sequence(PROMPT, response(said, "stop")) == [
        *encode(tokenizer(), PROMPT),
        *encode(tokenizer(), " Sure."),
        END,
    ]


def test_a_cut_inside_a_token_is_encoded_anew() -> None:
    reward = build_tokenizer([" Sure.Human: x"] * 4, 262, 128)  # ".Human" grows into one token
    merged = next((i for t, i in reward.get_vocab().items() if t.endswith("Hu") and len(t) > 2), None)
    stops = StopSequences(reward, ["Human:"])
    text = ScoringText(reward, reward, True, stops, 200)
    said = encode(reward, " Sure.Human:")
    got = text.sequence(PROMPT, response(said, "stop"))
    assert got == [*encode(reward, PROMPT), *encode(reward, " Sure."), reward.eos_token_id]
    assert merged is None or merged not in got


def test_a_response_at_its_limit_is_closed_with_an_eos_where_it_was_cut() -> None:
    said = encode(tokenizer(), " and on and on")
    end = scoring().reward.eos_token_id
    assert scoring().sequence(PROMPT, response(said, "length"))[-len(said) - 1 :] == [*said, end]


def test_a_spelled_out_eos_never_becomes_one() -> None:
    said = encode(tokenizer(), " Sure <|endoftext|> bad")
    for same in (True, False):
        text = scoring(same)
        ids = text.sequence(PROMPT, response([*said, END], "eos"))
        assert ids.count(text.reward.eos_token_id) == 1 and ids[-1] == text.reward.eos_token_id


def test_another_vocabulary_gets_the_text() -> None:
    said = [*encode(tokenizer(), " Sure."), END]
    text = scoring(same=False)
    expected = [*encode(text.reward, PROMPT), *encode(text.reward, " Sure."), text.reward.eos_token_id]
    assert text.sequence(PROMPT, response(said, "eos")) == expected


@pytest.mark.parametrize("max_length", [3, 8, 12])
def test_the_prompt_loses_its_beginning(max_length: int) -> None:
    said = [*encode(tokenizer(), " Sure."), END]
    whole = encode(tokenizer(), PROMPT) + said
    assert scoring(max_length=max_length).sequence(PROMPT, response(said, "eos")) == whole[-max_length:]


def test_requests_are_cut_by_count_and_never_by_timing() -> None:
    scorer = HashScorer(reward=lambda ids: float(ids[0]))
    pending = PendingScores(scorer, group=2)
    for row in (3, 0, 4, 1, 2):
        pending.add(row, [row])
    assert scorer.requests == [[[3], [0]], [[4], [1]]]
    assert pending.result() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert scorer.requests[2:] == [[[2]]]
