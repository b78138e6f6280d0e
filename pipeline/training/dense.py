"""Dense rewards: a response's beginnings are scored as well, and what each adds to the one before is paid there.

The rewards of a response sum to the score of the whole, so that the objective is the same; the value function learns
sooner which part of the response earned it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline.training.control import clip_scores
from pipeline.training.decode import Response
from pipeline.training.scoring_text import ScoringText
from pipeline.training.stopping import decode_text


def scored_lengths(response: Response, every: int, scoring: ScoringText) -> list[int]:
    """How many tokens the scored beginnings have: every `every` tokens, short of the end and of a stop sequence."""
    lengths = list(range(every, len(response.tokens), every)) if every else []
    if response.finish != "stop":
        return lengths
    text = scoring.text(response)
    return [length for length in lengths if text.startswith(decode_text(scoring.policy, response.tokens[:length]))]


def sequences(prompt: str, response: Response, every: int, scoring: ScoringText) -> list[list[int]]:
    """What is scored of a response: its beginnings, each closed as if it ended there, and at last the whole."""
    parts = [
        replace(response, tokens=response.tokens[:length], finish="length")
        for length in scored_lengths(response, every, scoring)
    ]
    return [scoring.sequence(prompt, part) for part in [*parts, response]]


@dataclass(frozen=True)
class Scores:
    """Of one response, unscaled: the whole's score, and those of its beginnings as (tokens, score)."""

    whole: float
    beginnings: list[tuple[int, float]]


def scores_of(responses: Sequence[Response], scores: Sequence[float], every: int, scoring: ScoringText) -> list[Scores]:
    """The scores of `sequences` of all responses, one after the other, taken apart again."""
    left: Iterator[float] = iter(scores)
    result = []
    for response in responses:
        beginnings = [(length, next(left)) for length in scored_lengths(response, every, scoring)]
        result.append(Scores(next(left), beginnings))
    assert next(left, None) is None, "a score was asked for that belongs to no response"
    return result


def shaped(scores: Scores, baseline: float, limit: float | None, penalty: float) -> Scores:
    """Less the baseline, and clipped to +-limit, if any: beginnings like the whole, so that they go on to its score.

    The penalty of a response that did not end is no reward model's word: it is subtracted behind the clipping, from
    the whole.
    """
    [whole] = clip_scores([scores.whole - baseline], limit)
    beginnings = clip_scores([score - baseline for _, score in scores.beginnings], limit)
    lengths = [length for length, _ in scores.beginnings]
    return Scores(whole - penalty, list(zip(lengths, beginnings, strict=True)))
