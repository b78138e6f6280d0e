"""What a person wants to know of each stage of a run. Reads plain files only, no configuration."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import UserError
from pipeline.run import atomic
from pipeline.run.directory import RunDir
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.queue import Queued, describe
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
    queue: str = ""
    """Where its Slurm job is, in words."""
    stuck: bool = False
    """Whether that job waits for something that will not come by itself."""

    @property
    def ended(self) -> bool:
        return self.state not in ("pending", "waiting", "running")


def view_run(run: RunDir, submission: Submission | None = None) -> list[StageView]:
    """The stages that have a state or outputs, in order."""
    submission, service = (
        _whole(each) for each in (submission or submissions.read(run), submissions.read(run, service=True))
    )
    views = []
    for stage in STAGES:
        owner = submission
        if service is not None and service.job_of(stage) and not (submission and submission.job_of(stage)):
            owner = service
        state = _state(run, owner, stage)
        if state is not None:
            job = owner.job_of(stage) if owner else None
            view = _view(run, stage, state, (job.job_id if job else None) or "")
            found = submissions.queued(owner, job) if owner and job and not view.ended else None
            views.append(replace(view, queue=_queue(run, view, found), stuck=found.stuck) if found else view)
    return views


def _whole(submission: Submission | None) -> Submission | None:
    """The submission with jobs whose ids were not recorded, if Slurm tells; not asked more often than SLURM_S."""
    if submission is None or time.time() - submission.time < submissions.SUBMITTING_S:
        return submission
    known = _found.get(submission.id)
    if known is None or known[1] != submission or time.monotonic() - known[0] > submissions.SLURM_S:
        whole = submission
        with contextlib.suppress(UserError):  # Slurm does not answer: what is recorded has to do
            whole = submissions.with_orphans(submission)
        known = _found[submission.id] = (time.monotonic(), submission, whole)
    return known[2]


_found: dict[str, tuple[float, Submission, Submission]] = {}
"""When it was asked, for which record, and the answer; by submission."""


def _queue(run: RunDir, view: StageView, job: Queued) -> str:
    """Where the job is, and how often it was started before."""
    recorded = atomic.read_json(run.attempt(view.stage, view.attempt) / "job.json") if view.attempt else None
    restarts = int((recorded or {}).get("slurm_restart_count", 0)) if not job.waits else 0
    return describe(job) + (f", restart {restarts}" if restarts else "")


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
