"""The mean reward on held-out prompts, which tells whether training gets anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.training.prompts import blocks, generator_for

if TYPE_CHECKING:
    from pipeline.data.preferences import Preference
    from pipeline.training.ranks import Ranks
    from pipeline.training.rollout import Sampler


def heldout_reward(
    sampler: Sampler,
    preferences: Sequence[Preference],
    baselines: Mapping[int, float] | None,
    chunk_size: int,
    seed: int,
    ranks: Ranks,
) -> dict[str, float]:
    """Sample one response a prompt and return "reward/mean" and its companions; to be called by every rank.

    With `baselines` the reward is measured from the data set's own answer ("reward/score_mean" never is). Chunks and
    their noise are the same at every evaluation and whatever the number of ranks.
    """
    results: list[tuple[int, float, int, bool]] = []
    for number, rows in enumerate(blocks(range(len(preferences)), chunk_size)):
        if number % ranks.world != ranks.rank:
            continue
        generator = generator_for(sampler.split.device, seed, "heldout", number)
        responses, pending = sampler.sample([preferences[row].prompt for row in rows], generator)
        for row, response, score in zip(rows, responses, pending.result(), strict=True):
            results.append((row, score, len(response.tokens), response.finish != "length"))
    everyone = sorted(result for part in ranks.gather(results) for result in part)
    count = len(everyone)
    scores = [score for _, score, _, _ in everyone]
    rewards = [score - baselines[row] for row, score, _, _ in everyone] if baselines else scores
    return {
        "reward/mean": sum(rewards) / count,
        "reward/score_mean": sum(scores) / count,
        "reward/length_mean": sum(length for _, _, length, _ in everyone) / count,
        "reward/ended": sum(ended for _, _, _, ended in everyone) / count,
    }
