"""The reward of the data set's own answers, which delta rewards are measured from: scored once for all phases."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.preferences import Preference
from pipeline.run import atomic
from pipeline.run.hashing import fingerprint
from pipeline.training.prompts import blocks
from pipeline.training.ranks import Ranks
from pipeline.training.scoring_text import ScoringText

if TYPE_CHECKING:
    from pipeline.serving.scorer import Scorer

logger = logging.getLogger(__name__)

BLOCK = 64
"""Answers a request. Requests are the same whatever the number of ranks, and so are the scores."""
_AHEAD = 8
"""Requests of a rank that are under way at once; the scorer bounds what reaches the server."""


def baseline_scores(
    cache: Path,
    preferences: Sequence[Preference],
    rows: Sequence[int],
    scoring: ScoringText,
    scorer: Scorer,
    ranks: Ranks,
    report: Callable[[str], None],
) -> dict[int, float]:
    """The score of the chosen answer of each row in `rows`; to be called by every rank.

    Kept in `cache` under the answers' content and the scorer's identity, so a rerun or a resume asks for nothing. A
    scorer that cannot say which model it serves is asked each time.
    """
    texts = [(preferences[row].prompt, preferences[row].chosen) for row in rows]
    key = fingerprint({"answers": texts, "model": scorer.identity, "max_length": scoring.max_length, "block": BLOCK})
    path = cache / f"baselines-{key[:32]}.json"
    known = ranks.from_first(atomic.read_json(path) if ranks.first and scorer.identity is not None else None)
    if known is not None:
        return dict(zip(rows, known["scores"], strict=True))

    places = blocks(range(len(rows)), BLOCK)
    mine = places[ranks.rank :: ranks.world]
    waiting: deque[tuple[list[int], Future[list[float]]]] = deque()
    scores: dict[int, float] = {}

    def collect_one() -> None:
        block, future = waiting.popleft()
        scores.update(zip(block, future.result(), strict=True))
        report(f"baselines {len(scores) * ranks.world}/{len(rows)}")

    for block in mine:
        waiting.append((block, scorer.submit([scoring.answer(*texts[place]) for place in block])))
        if len(waiting) > _AHEAD:
            collect_one()
    while waiting:
        collect_one()
    for part in ranks.gather(scores):
        scores.update(part)
    ordered = [scores[place] for place in range(len(rows))]
    if ranks.first and scorer.identity is not None:
        atomic.write_json(path, {"model": scorer.identity, "scores": ordered})
    return dict(zip(rows, ordered, strict=True))
