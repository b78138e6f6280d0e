"""What a person wants to know of each stage of a run. Reads plain files only, no configuration."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from pipeline.run import atomic
from pipeline.run.directory import RunDir
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.state import State, recorded_state, resolve
from pipeline.scheduler.submission import Submission
from pipeline.stages.names import STAGES


@dataclass(frozen=True)
class StageView:
    """One line of a status table."""

    stage: str
    state: str
    attempt: int
    job_id: str
    seconds: float | None
    step: int
    total: int
    detail: str

    @property
    def ended(self) -> bool:
        return self.state not in ("pending", "waiting", "running")


def view_run(run: RunDir, submission: Submission | None = None) -> list[StageView]:
    """The stages that have a state or outputs, in order."""
    submission = submission or submissions.read(run)
    service = submissions.read(run, service=True)
    views = []
    for stage in STAGES:
        owner = submission
        if service is not None and service.job_of(stage) and not (submission and submission.job_of(stage)):
            owner = service
        state = _state(run, owner, stage)
        if state is not None:
            job = owner.job_of(stage) if owner else None
            views.append(_view(run, stage, state, (job.job_id if job else None) or ""))
    return views


def _state(run: RunDir, submission: Submission | None, stage: str) -> State | None:
    if submission is not None and submission.job_of(stage) is not None:
        return resolve(run, submission, stage)
    return recorded_state(run, stage)


def _view(run: RunDir, stage: str, state: State, job_id: str) -> StageView:
    progress: dict[str, Any] = {}
    seconds: float | None = None
    if state.attempt:
        folder = run.attempt(stage, state.attempt)
        if state.state == "running":
            progress = atomic.read_json(folder / "out" / "progress.json") or {}
            seconds = time.time() - state.time
        else:
            ended = atomic.read_json(folder / "exit.json")
            seconds = ended["seconds"] if ended else None
    elif state.state == "running":
        seconds = time.time() - state.time
    detail = progress.get("note", "") if state.state == "running" and progress else state.reason
    return StageView(
        stage,
        state.state,
        state.attempt,
        job_id,
        seconds,
        progress.get("step", 0),
        progress.get("total", 0),
        detail,
    )
