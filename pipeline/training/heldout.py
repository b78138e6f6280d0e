"""The mean reward on held-out prompts, which tells whether training gets anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipeline.training.prompts import blocks, generator_for

if TYPE_CHECKING:
    from pipeline.data.preferences import Preference
    from pipeline.training.ranks import Ranks
    from pipeline.training.rollout import Sampler


@dataclass(frozen=True, order=True)
class Answer:
    """One sampled answer to a held-out prompt."""

    row: int
    prompt: str
    text: str
    score: float
    reward: float
    """The score, from the data set's own answer where there are baselines."""
    finish: str
    tokens: int

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def heldout_answers(
    sampler: Sampler,
    preferences: Sequence[Preference],
    baselines: Mapping[int, float] | None,
    chunk_size: int,
    seed: int,
    ranks: Ranks,
    stop: Callable[[], bool] = lambda: False,
) -> list[Answer] | None:
    """Sample one response a prompt; every rank gets all of them, in the prompts' order. To be called by every rank.

    Chunks and their noise are the same at every evaluation and whatever the number of ranks. None when a `stop` was
    asked for meanwhile.
    """
    answers: list[Answer] = []
    stopped = False
    for number, rows in enumerate(blocks(range(len(preferences)), chunk_size)):
        if number % ranks.world != ranks.rank:
            continue
        stopped = stopped or stop()
        if stopped:
            break
        generator = generator_for(sampler.split.device, seed, "heldout", number)
        responses, pending = sampler.sample([preferences[row].prompt for row in rows], generator)
        for row, response, score in zip(rows, responses, pending.result(), strict=True):
            reward = score - baselines[row] if baselines else score
            text = sampler.scoring.text(response)
            prompt = preferences[row].prompt
            answers.append(Answer(row, prompt, text, score, reward, response.finish, len(response.tokens)))
    if ranks.any(stopped):
        return None
    return sorted(answer for part in ranks.gather(answers) for answer in part)


def reward_row(answers: Sequence[Answer]) -> dict[str, float]:
    """ "reward/mean" and its companions; "reward/score_mean" is never measured from a baseline."""
    count = len(answers)
    return {
        "reward/mean": sum(answer.reward for answer in answers) / count,
        "reward/score_mean": sum(answer.score for answer in answers) / count,
        "reward/length_mean": sum(answer.tokens for answer in answers) / count,
        "reward/ended": sum(answer.finish != "length" for answer in answers) / count,
    }
