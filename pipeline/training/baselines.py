"""The reward of the data set's own answers, which delta rewards are measured from: scored once for all phases.

Kept on disk by content, below the identity of the model that gave them, so that a rerun or a resume asks for nothing,
nor does another run that is given the same folder. Files are written whole and never changed; each carries its own
hash, and what is damaged is scored again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.check_methods import GROUPED
from pipeline.config.methods import PPO
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
_BLOCKS_A_FILE = 16


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

    Scores are taken from the folder `cache` and added to it, as they come in. A scorer that cannot say which model it
    serves is asked each time.
    """

    def tokens(place: int) -> list[int]:
        preference = preferences[rows[place]]
        return scoring.answer(preference.prompt, preference.chosen)

    places = range(len(rows))
    keys: dict[int, str] = {}
    for part in ranks.gather({place: content_key(tokens(place)) for place in places[ranks.rank :: ranks.world]}):
        keys.update(part)
    folder = cache / "baselines" / scorer.identity[:32] if scorer.identity is not None else None
    known: dict[str, float] = ranks.from_first(_needed(folder, set(keys.values())) if ranks.first else None)

    # A block is asked for as a whole even where a part of it is known: its scores are then those of a first run.
    missing = [block for block in blocks(places, BLOCK) if any(keys[place] not in known for place in block)]
    mine = missing[ranks.rank :: ranks.world]
    waiting: deque[tuple[list[int], Future[list[float]]]] = deque()
    scores: dict[str, float] = {}
    unsaved: dict[str, float] = {}

    def collect_one() -> None:
        block, future = waiting.popleft()
        unsaved.update(zip([keys[place] for place in block], future.result(), strict=True))
        if len(unsaved) >= _BLOCKS_A_FILE * BLOCK:
            save()
        report(f"baselines {(len(scores) + len(unsaved)) * ranks.world}/{len(missing) * BLOCK}")

    def save() -> None:
        if folder is not None and unsaved:
            write_scores(folder, str(scorer.identity), unsaved)
        scores.update(unsaved)
        unsaved.clear()

    for block in mine:
        waiting.append((block, scorer.submit([tokens(place) for place in block])))
        if len(waiting) > _AHEAD:
            collect_one()
    while waiting:
        collect_one()
    save()
    for part in ranks.gather(scores):
        known.update(part)
    return {rows[place]: known[keys[place]] for place in places}


def baselines_cancel(ppo: PPO) -> bool:
    """Whether no advantage depends on what a prompt's scores are measured from, so that nobody needs to know it.

    RLOO and GRPO compare the returns of one prompt's answers, and all of them are short of the same baseline. Two
    things come between: a limit on the delta, which cuts one answer's off and not another's, and the running standard
    deviation of the deltas of all prompts, which the baselines are part of.
    """
    return ppo.advantage in GROUPED and ppo.cliprange_reward is None and ppo.scale_reward != "running"


def content_key(tokens: Sequence[int]) -> str:
    """What an answer is known by: a hash of its token ids."""
    return hashlib.sha256(array("q", tokens).tobytes()).hexdigest()[:32]


def write_scores(folder: Path, identity: str, scores: Mapping[str, float]) -> None:
    """Add a file to the folder. Its name follows from what it holds: several writers cannot disturb each other."""
    text = json.dumps({"model": identity, "scores": scores, "sha256": fingerprint(scores)}, separators=(",", ":"))
    atomic.write_text(folder / f"{fingerprint(sorted(scores))[:32]}.json", text + "\n")


def read_scores(folder: Path, identity_start: str) -> dict[str, float]:
    """All scores in the folder. A damaged file is removed, with a warning."""
    scores: dict[str, float] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            scores.update(_parse(path.read_bytes(), identity_start))
        except FileNotFoundError:  # another run found it damaged
            continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s: removed, it is damaged (%s); its answers are scored again", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
    return scores


def _parse(data: bytes, identity_start: str) -> dict[str, float]:
    raw: dict[str, Any] = json.loads(data)
    scores: dict[str, float] = raw["scores"]
    if not raw["model"].startswith(identity_start):
        raise ValueError("it is of another model")
    if fingerprint(scores) != raw["sha256"] or not all(math.isfinite(score) for score in scores.values()):
        raise ValueError("its content does not fit its hash")
    return scores


def _needed(folder: Path | None, keys: set[str]) -> dict[str, float]:
    """What is known of the answers with these keys."""
    found = read_scores(folder, folder.name) if folder is not None else {}
    return {key: found[key] for key in keys if key in found}
