"""A stage's state, worked out from what it wrote and whether its job lives. Never from the executor's word alone."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import procs
from pipeline.run import atomic, events
from pipeline.run.directory import RunDir
from pipeline.scheduler import slurm
from pipeline.scheduler.submission import SUBMITTING_S, Job, Submission, job_alive, job_log
from pipeline.stages.faults import LOG_MARK

ENDED = ("done", "skipped", "failed", "cancelled", "stopped")


@dataclass(frozen=True)
class State:
    """stages/<stage>/state.json, written by the stage's job (and by `cancel`)."""

    submission: str
    state: str
    """pending, waiting, running, done, skipped, failed, cancelled or stopped."""
    reason: str = ""
    attempt: int = 0
    time: float = 0.0

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def good(self) -> bool:
        """Whether stages that need this one can go on."""
        return self.state in ("done", "skipped")


def set_state(run: RunDir, stage: str, submission: str, state: str, reason: str = "", attempt: int = 0) -> None:
    """Record a change of state, in state.json and in the events."""
    now = State(submission, state, reason, attempt, time.time())
    atomic.write_json(run.stage(stage) / "state.json", asdict(now))
    events.record(run, f"stage {state}", stage=stage, reason=reason, attempt=attempt, submission=submission)


def recorded_state(run: RunDir, stage: str) -> State | None:
    """What the stage's job wrote last, or None."""
    raw: dict[str, Any] | None = atomic.read_json(run.stage(stage) / "state.json")
    return State(**raw) if raw is not None else None


def resolve(run: RunDir, submission: Submission, stage: str) -> State:
    """The state of a stage of `submission`: a job that is gone without having said how it ended has failed."""
    job = submission.job_of(stage)
    if job is None:
        return State(submission.id, "skipped", "not part of this submission")
    alive = job_alive(submission, job)
    recorded = recorded_state(run, stage)  # read after asking for the job: it may end in between
    if recorded is None or recorded.submission != submission.id:
        recorded = State(submission.id, "pending")
    if recorded.ended or alive:
        return recorded
    if job.job_id is None and time.time() - submission.time < SUBMITTING_S:
        return recorded  # still being submitted
    if recorded.attempt and (outputs := run.outputs(stage)) and outputs.attempt == recorded.attempt:
        return State(submission.id, "done", "it was killed when all was written", recorded.attempt, outputs.finished)
    for parent in job.waits_for if recorded.state in ("pending", "waiting") else ():
        before = resolve(run, submission, parent)  # Slurm ends what waits for a job that failed
        if before.ended and not before.good:
            return State(submission.id, "cancelled", f"{parent} {before.state}", recorded.attempt, recorded.time)
    try:
        state, reason = _end(run, submission, job, recorded.attempt > 0)
    except procs.NoAnswer:
        return recorded  # nothing is known, and nothing made up
    return State(submission.id, state, reason, recorded.attempt, recorded.time)


def _end(run: RunDir, submission: Submission, job: Job, began: bool) -> tuple[str, str]:
    """State and reason of a job that ended without a word of its own. Raises NoAnswer."""
    if job.job_id is None:
        return "failed", "was never submitted"
    slurm_id = job.job_id if submission.executor == "slurm" else submission.allocation
    word = slurm.end_state(slurm_id, submission.time) if slurm_id else ""
    said = slurm.in_words(word)
    if word == "CANCELLED":
        return "cancelled", f"job {slurm_id}: {said}"
    if said is None and not began and (line := _last_line(job_log(run, submission, job))):
        return "failed", f"its job {job.job_id} ended before its work began: {line}"
    return "failed", f"died (job {job.job_id}): {said or 'it was killed or lost its node'}"


def _last_line(log: Path) -> str:
    """What a job's log ends with: of a module that does not load, or a command that is not there.

    Nothing once srun has spoken: the task had begun then, and something ended it.
    """
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines()]
    if any(line.startswith(("srun: ", "slurmstepd: ")) for line in lines):
        return ""
    return next((line for line in reversed(lines) if line and not line.startswith(LOG_MARK)), "")
