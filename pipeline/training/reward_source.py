"""The reward model that a training is scored by, and its change between two phases to one that the run announces.

checkpoints/<fingerprint>/reward-models.json says from which phase on which model counts. A change is preceded by a
checkpoint: whoever resumes later never has to score an earlier phase, and so never needs the earlier model again.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run import atomic, endpoint, reward_models, service_metrics
from pipeline.run.directory import RunDir
from pipeline.serving.client import TRITON_HOST, Published, connect_scorer
from pipeline.serving.scorer import LocalScorer
from pipeline.serving.usage import Traffic, traffic_row
from pipeline.training.ranks import Ranks

if TYPE_CHECKING:
    from pipeline.serving.scorer import Scorer

LEDGER = "reward-models.json"

logger = logging.getLogger(__name__)


class _Use:
    """Says which model this training is scored by, again and again: one that is killed falls silent."""

    def __init__(self, run: RunDir, identity: str | None) -> None:
        self._run, self._identity = run, identity
        self._saying, self._over = threading.Lock(), threading.Event()
        reward_models.use(run, identity)
        self._thread = threading.Thread(target=self._repeat, name="reward-model-in-use", daemon=True)
        self._thread.start()

    def change(self, identity: str | None) -> None:
        """It is another model from now on."""
        with self._saying:  # else the word of before could come after this one
            self._identity = identity
            reward_models.use(self._run, identity)

    def end(self) -> None:
        """The training is over, or stops for now."""
        self._over.set()
        self._thread.join()
        reward_models.release(self._run)

    def _repeat(self) -> None:
        while not self._over.wait(reward_models.RENEW_S):
            try:
                with self._saying:
                    reward_models.use(self._run, self._identity)
            except (UserError, OSError) as error:  # the training's own writes tell whether this is its end
                logger.warning("cannot say which reward model is in use: %s", error)


@dataclass
class RewardSource:
    """Connects to the run's reward model, and says when there is another. To be asked by every rank, and closed."""

    run: RunDir
    config: Config
    ledger: Path
    """This training's record of its models."""
    ranks: Ranks
    _use: _Use | None = field(default=None, init=False)
    _scorer: Scorer | None = field(default=None, init=False)

    def connect(self) -> Scorer:
        """The model that the run is to use now; every rank gets the same."""
        identity = self.ranks.from_first(reward_models.expected(self.run) if self.ranks.first else None)
        self._note_use(identity)
        self._scorer = self._connect(identity)
        return self._scorer

    def begin(self, phase: int, scorer: Scorer) -> bool:
        """Record which model scores the next phase, the first of this segment.

        Returns whether it is the first phase after a change of model.
        """
        entries = [entry for entry in self._entries() if entry["phase"] <= phase]
        if entries and entries[-1]["identity"] == scorer.identity:
            return len(entries) > 1 and bool(entries[-1]["phase"] == phase)
        self._write(entries, phase, scorer.identity)
        if entries:
            _report(phase, scorer.identity, entries[-1]["identity"])
        return bool(entries)

    def announced(self, scorer: Scorer) -> str | None:
        """The identity of another model than the scorer's, if the run announces one that every rank can change to.

        It is said to be in use at once: by the time that all have changed to it, a third one may be announced.
        """
        wanted = self.ranks.from_first(self._wanted(scorer) if self.ranks.first else None)
        if wanted is None:
            return None
        waits = not isinstance(scorer, LocalScorer) and not wanted["alone"]
        missing = waits and not Published(self.run, wanted["identity"]).alive()
        if self.ranks.any(missing):
            return None
        if not wanted["alone"]:  # else the earlier server would end before its clients have left it
            self._note_use(wanted["identity"])
        return str(wanted["identity"])

    def change(self, phase: int, identity: str, scorer: Scorer) -> Scorer:
        """Connect to the announced model, which scores from `phase` on, and let go of the earlier one."""
        local = isinstance(scorer, LocalScorer)
        scorer.close()
        self._note_use(identity)  # a server that has to make room is told by this
        changed = self._scorer = self._connect(identity, wait=not local)
        self._write(self._entries(), phase, identity)
        _report(phase, identity, scorer.identity)
        return changed

    def close(self) -> None:
        """Let go of the model: the training is over, or stops for now."""
        try:
            if self._scorer is not None:
                self._scorer.close()
        finally:
            if self._use is not None:
                self._use.end()

    def _wanted(self, scorer: Scorer) -> dict[str, Any] | None:
        model = reward_models.announced(self.run)
        expected = reward_models.expected(self.run)
        if expected is None or expected == scorer.identity or os.environ.get(TRITON_HOST):
            return None  # TRITON_HOST names one server: it cannot lead to another
        return {"identity": expected, "alone": model is not None and model.alone}

    def _connect(self, identity: str | None, wait: bool = False) -> Scorer:
        """`wait`: its server is known to come."""
        environ = dict(os.environ)
        if wait:
            environ[endpoint.WAIT_VARIABLE] = str(self.config.serving.start_timeout_s)
        return connect_scorer(self.run, self.config, environ, identity=identity)

    def _entries(self) -> list[dict[str, Any]]:
        """The record, as rank 0 reads it."""
        entries: list[dict[str, Any]] = self.ranks.from_first(
            atomic.read_json(self.ledger) or [] if self.ranks.first else None
        )
        return entries

    def _write(self, entries: list[dict[str, Any]], phase: int, identity: str | None) -> None:
        kept = [entry for entry in entries if entry["phase"] < phase]
        if self.ranks.first:
            atomic.write_json(self.ledger, [*kept, {"phase": phase, "identity": identity}])

    def _note_use(self, identity: str | None) -> None:
        if not self.ranks.first:
            return
        if self._use is None:
            self._use = _Use(self.run, identity)
        else:
            self._use.change(identity)


def server_figures(run: RunDir, clients: Sequence[Traffic], since: float) -> dict[str, float]:
    """What this training's clients asked for, and how its server fared since the time `since`, as metrics."""
    figures: dict[str, float] = traffic_row(clients)
    server = service_metrics.last(run)
    if figures and server is not None and server["time"] >= since:
        figures |= {name: server[name] for name in ("batch_mean", "queue_ms", "compute_ms")}
    return {f"{service_metrics.PREFIX}{name}": value for name, value in figures.items()}


def _report(phase: int, identity: str | None, earlier: str | None) -> None:
    logger.info("from phase %d on rewards come from %s, no longer from %s", phase, _short(identity), _short(earlier))


def _short(identity: str | None) -> str:
    return f"reward model {identity[:12]}" if identity else "a reward model without an identity"
