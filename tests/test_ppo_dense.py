"""Scores of a response's beginnings: what is asked for, what is paid where, and that the sum is the whole's score."""

from __future__ import annotations

import pytest
import torch
from helpers_ppo import HashScorer, tiny_config, tiny_model, tokenizer
from helpers_update import ALONE, SCORES, TEMPERATURE, phase, settings

from pipeline.data.tokens import encode, end_id
from pipeline.training.advantages import increments
from pipeline.training.decode import Response
from pipeline.training.dense import Scores, scored_lengths, scores_of, sequences, shaped
from pipeline.training.microbatches import Limits
from pipeline.training.rollout import Sampler
from pipeline.training.scoring_text import ScoringText
from pipeline.training.split import split_model
from pipeline.training.stopping import StopSequences
from pipeline.training.update import targets_of

STOPS = StopSequences(tokenizer(), ["Human:"])
SCORING = ScoringText(tokenizer(), tokenizer(), same_vocabulary=True, stops=STOPS, max_length=96)
PROMPT = "\n\nHuman: Hello\n\nAssistant:"


def response(text: str, finish: str) -> Response:
    tokens = encode(tokenizer(), text) + [end_id(tokenizer())] * (finish == "eos")
    return Response(0, encode(tokenizer(), PROMPT), tokens, finish, torch.zeros(1, 1), torch.zeros(len(tokens)))  # type: ignore[arg-type]


def test_beginnings_are_scored_every_so_many_tokens_as_if_they_ended_there() -> None:
    whole = response(" a good answer to that", "eos")
    count, end = len(whole.tokens), end_id(tokenizer())
    asked = sequences(PROMPT, whole, 3, SCORING)
    prompt = encode(tokenizer(), PROMPT)
    expected = [prompt + whole.tokens[:length] + [end] for length in range(3, count, 3)]
    assert len(expected) >= 2 and asked == [*expected, prompt + whole.tokens]
    assert sequences(PROMPT, whole, 0, SCORING) == [prompt + whole.tokens]


def test_no_beginning_reaches_into_a_stop_sequence() -> None:
    whole = response(" yes.\n\nHuman:", "stop")
    lengths = scored_lengths(whole, 1, SCORING)
    assert lengths == list(range(1, len(lengths) + 1)) and lengths
    assert len(lengths) <= len(encode(tokenizer(), " yes."))


def test_baseline_and_clip_act_on_beginnings_as_on_the_whole_and_the_penalty_on_the_whole() -> None:
    found = shaped(Scores(7.0, [(3, 2.0), (6, 30.0)]), baseline=1.0, limit=10.0, penalty=0.5)
    assert found == Scores(5.5, [(3, 1.0), (6, 10.0)])
    assert increments([*found.beginnings, (8, found.whole)]) == [(3, 1.0), (6, 9.0), (8, -4.5)]


def test_the_penalty_is_not_clipped_away() -> None:
    assert shaped(Scores(-50.0, []), 0.0, 10.0, penalty=1.0).whole == -11.0


def test_scores_find_their_responses_again() -> None:
    two = [response(" a good answer to that", "eos"), response(" no", "length")]
    parts = [len(sequences(PROMPT, each, 3, SCORING)) for each in two]
    scores = [float(place) for place in range(sum(parts))]
    first, second = scores_of(two, scores, 3, SCORING)
    assert [score for _, score in first.beginnings] == scores[: parts[0] - 1] and first.whole == scores[parts[0] - 1]
    assert second.whole == scores[-1] and len(second.beginnings) == parts[1] - 1
    with pytest.raises(AssertionError):
        scores_of(two, [*scores, 0.0], 3, SCORING)


def test_rewards_telescope_to_the_score_of_the_whole() -> None:
    """With gamma = lam = 1 the first token's return is the sum of all rewards, whatever was paid on the way."""
    exp = phase(split_model(tiny_model(spread=3.0), 1), Limits(4))[3]
    beginnings = [[(length, 0.3 * length) for length in range(2, count, 2)] for count in exp.packing.lengths]
    ppo = settings(lam=1.0)
    dense = targets_of(exp, SCORES, 0.0, ppo, ALONE, beginnings).returns
    for row, (offset, count) in enumerate(zip(exp.packing.offsets, exp.packing.lengths, strict=True)):
        returns = dense[offset : offset + count].tolist()
        earned = [0.3 * (place - place % 2) if place < count else SCORES[row] for place in range(count)]
        expected = [SCORES[row] - (earned[place] if place >= 2 else 0.0) for place in range(count)]
        assert returns == pytest.approx(expected, abs=1e-5)


def test_the_sampler_sends_beginnings_with_the_rows_that_ended() -> None:
    split = split_model(tiny_model(spread=3.0), 1)
    scorer = HashScorer(lambda ids: float(len(ids)))
    generate = tiny_config().generate.model_copy(update={"temperature": TEMPERATURE, "stop_sequences": ()})
    sampler = Sampler(split, tokenizer(), SCORING, scorer, generate, 40, torch.no_grad)  # type: ignore[arg-type]
    prompts = [PROMPT, "\n\nHuman: Why?\n\nAssistant:", PROMPT]
    responses, pending = sampler.sample(prompts, torch.Generator().manual_seed(3), dense_every=4)
    found = scores_of(responses, pending.result(), 4, SCORING)
    for prompt, each, scores in zip(prompts, responses, found, strict=True):
        asked = sequences(prompt, each, 4, SCORING)
        assert [score for _, score in scores.beginnings] + [scores.whole] == [len(ids) for ids in asked]
    assert sum(len(request) for request in scorer.requests) == sum(1 + len(each.beginnings) for each in found)
    assert any(each.beginnings for each in found)
