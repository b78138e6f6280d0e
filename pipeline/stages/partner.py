"""The other job of a separate placement: a server's training, or a training's server.

A person may submit the scripts of both again, in either order. What the other one's earlier job said of its end then
says nothing: it is waited for, though not for ever.
"""

from __future__ import annotations

import time

from pipeline.run.directory import RunDir
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.state import State, recorded_state, resolve
from pipeline.scheduler.submission import Submission

LOOK_S = 30.0
"""Seconds between looks at the other job: they ask Slurm's controller."""
PATIENCE_S = 600.0
"""Seconds in which the other script must be submitted again; in the queue it may wait for as long as it takes."""


class Partner:
    """The job that runs `stage` beside the one of this process, which runs `mine`."""

    def __init__(self, run: RunDir, submission: Submission, mine: str, stage: str) -> None:
        self._run = run
        self._submission = submission
        self._mine = mine
        self._stage = stage
        self._looked = float("-inf")
        self._known: State | None = None
        self.missed = False
        """Whether it ended before this job began, and no other came in its place."""

    @property
    def exists(self) -> bool:
        """Whether the submission has such a job."""
        return self._submission.job_of(self._stage) is not None

    def ended(self) -> str | None:
        """How it ended, in words; None while it waits or runs, or may be submitted again. To be asked often."""
        recorded = recorded_state(self._run, self._stage)
        news = recorded is not None and recorded != self._known and recorded.submission == self._submission.id
        if not (news and recorded and recorded.ended) and time.monotonic() - self._looked < LOOK_S:
            return None
        self._looked, self._known = time.monotonic(), recorded
        # Read again: a job whose script was submitted by hand has taken the place of the one before.
        self._submission = submissions.find(self._run, self._submission.id) or self._submission
        state = resolve(self._run, self._submission, self._stage)
        if not state.ended or self._comes(state):
            return None
        mine = self._submission.job_of(self._mine)
        nothing_left = self._stage == "train" and state.good
        self.missed = mine is not None and 0 < state.time < mine.by_hand and not nothing_left
        again = f"; its script was not submitted again within {PATIENCE_S / 60:.0f} min" if self.missed else ""
        return f"{self._stage} {state.state}: {state.reason}{again}"

    def _comes(self, state: State) -> bool:
        """Whether this end is of an earlier job, in whose place another one may come."""
        mine, other = self._submission.job_of(self._mine), self._submission.job_of(self._stage)
        assert mine is not None and other is not None
        if not mine.by_hand or (self._stage == "train" and state.good):  # nothing is left to be served
            return False
        if state.time > mine.by_hand and not state.good:
            return False
        # A server that ended well did so with the training before this one.
        waited = time.time() - max(mine.by_hand, state.time)
        return waited < PATIENCE_S or submissions.waits_by_script(self._submission, other)
