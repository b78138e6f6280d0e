"""Jobs as processes inside the Slurm allocation that the submitter runs in, and what happens when Slurm ends it.

They are the submitter's children and end with it, as everything in an allocation ends with its script.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from pipeline import procs
from pipeline.config.cluster import Cluster
from pipeline.errors import UserError
from pipeline.run import atomic
from pipeline.run.directory import RunDir
from pipeline.run.progress import saved_steps
from pipeline.scheduler import slurm
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.options import shell_command
from pipeline.scheduler.state import recorded_state, resolve, set_state
from pipeline.scheduler.submission import Job, Submission
from pipeline.stages.names import TRAININGS
from pipeline.stages.nodes import MEETING

ENDED = 75
"""Exit status (EX_TEMPFAIL) of a submitter whose allocation ended before its jobs."""
TERM_S = 25.0
"""Seconds to save in after TERM: Slurm kills 30 seconds later (KillWait), where the site has not changed it."""
_OTHERS = ("PMI_", "PMIX_", "SUBMITIT_")
"""Variables of the step that the submitter may run in, which its jobs are no part of."""


@dataclass(frozen=True)
class Allocation:
    """The allocation around this process."""

    job: str
    restart: int


def surrounding(environ: Mapping[str, str] = os.environ) -> Allocation:
    """The allocation around this process; UserError where there is none, or this is not one of its nodes."""
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        raise UserError(
            'cluster.executor: "allocation", but there is no Slurm allocation around this command; '
            "start it by sbatch slurm/pipeline.sbatch, or inside salloc"
        )
    if not slurm.on_a_node(environ):
        raise UserError(
            f'cluster.executor: "allocation", but this shell is not on a node of allocation {job}; '
            "put srun --overlap --nodes=1 --ntasks=1 in front of the command"
        )
    return Allocation(job, int(environ.get("SLURM_RESTART_COUNT", "0")))


def earlier_start(run: RunDir, forced: Sequence[str]) -> Submission | None:
    """What this allocation was to force before it was queued again, where that is the same: it goes on with that.

    Its batch script repeats the command at each start.
    """
    here, before = surrounding(), submissions.read(run)
    if before is None or before.allocation != here.job or before.restart >= here.restart:
        return None
    return before if forced and before.forced == tuple(forced) else None


def start_jobs(run: RunDir, submission: Submission, cluster: Cluster, code: Path) -> Submission:
    """Start the jobs, each waiting for those that it needs, and record their processes."""
    for job in submission.jobs:
        folder = submissions.job_folder(run, submission.id, job)
        folder.mkdir(parents=True, exist_ok=True)
        argv = shell_command(sys.executable, cluster, run.root, code, job, submission.id)
        with (folder / "0_log.err").open("ab") as output:
            child = procs.spawn(argv, env=_environment(run, submission, job), output=output)
        submission = submission.with_job(replace(job, job_id=str(child.pid), process=procs.process_of(child.pid)))
        submissions.write(run, submission)
    return submission


def _environment(run: RunDir, submission: Submission, job: Job) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_OTHERS)}
    meeting = f"{submission.id}-{job.name}-{submission.restart}"  # a start's own: a requeued allocation has new ones
    return {**kept, procs.RUN_MARK: str(run.root), procs.STAGE_MARK: job.name, MEETING: meeting}


class Ending:
    """Remembers that the allocation is about to end, by Slurm (USR2 is a warning, TERM leaves seconds) or by hand.

    Made in the main thread. Until jobs are followed, such a signal leaves at once: the run's lock must not be held by
    a process that Slurm kills, and jobs that have just been started end with this process.
    """

    def __init__(self, run: RunDir, here: Allocation, requeue: bool) -> None:
        self.following = False
        self.warned = False
        self.terminated = False
        self.by_hand = False
        self.saved_before = saved_steps(run)
        """What trainings had saved when this start began."""
        self._job = here.job
        self._requeue = requeue
        signal.signal(signal.SIGUSR2, self._remember)
        signal.signal(signal.SIGTERM, self._remember)

    def __bool__(self) -> bool:
        return self.warned or self.terminated or self.by_hand

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR2:
            self.warned = True
        else:
            self.terminated = True
        if not self.following:
            self._leave()

    def _leave(self) -> None:
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        # A warning alone says that the time is too short: the next start would not get further.
        interrupted = slurm.preempted(self._job) if self.warned else slurm.interrupted(self._job)
        if interrupted and self._requeue and slurm.is_batch(self._job):
            slurm.requeue(self._job)
        raise SystemExit("the allocation ended before its jobs had begun; the same command begins anew")


def wind_up(run: RunDir, submission: Submission, cluster: Cluster, ending: Ending) -> str:
    """End the jobs, the training saved, and queue the allocation again where it was interrupted; says what it did."""
    stages = [stage for job in submission.jobs for stage in job.stages]
    unfinished = [stage for stage in stages if not resolve(run, submission, stage).ended]
    assert submission.allocation is not None
    if not (ending.warned or ending.by_hand):
        ending.terminated = False  # the next one is the last
        if slurm.has_grace(submission.allocation):
            _let_end(run, submission, cluster.grace_s - TERM_S, ending)
    elif ending.warned:
        _let_end(run, submission, cluster.grace_s - TERM_S, ending)
    progress = _has_progress(run, submission, ending.saved_before)
    for job in reversed(submissions.live_jobs(submission)):
        assert job.process is not None
        procs.terminate(job.process)
    outcome = _decide(submission, cluster, ending, progress, unfinished)
    _record(run, submission, unfinished, outcome)  # at once: where Slurm kills soon, jobs may not get to it
    deadline = time.monotonic() + TERM_S
    while submissions.live_jobs(submission) and time.monotonic() < deadline:
        time.sleep(0.1)
    _record(run, submission, unfinished, outcome)
    if outcome.again:
        slurm.requeue(submission.allocation)
    return outcome.words


@dataclass(frozen=True)
class _Outcome:
    again: bool
    state: str
    reason: str
    words: str


def _decide(
    submission: Submission, cluster: Cluster, ending: Ending, progress: bool, unfinished: list[str]
) -> _Outcome:
    job = submission.allocation
    assert job is not None
    if ending.by_hand or not (ending.warned or slurm.interrupted(job)):
        words = "its jobs were ended; the same command goes on from here"
        return _Outcome(False, "cancelled", "its allocation was cancelled or is over", words)
    if ending.warned and not progress and not slurm.preempted(job):
        words = f"{', '.join(unfinished)}: not done within the allocation's time; give it more (sbatch --time)"
        return _Outcome(False, "stopped", "not done within the allocation's time", words)
    if not cluster.requeue or not slurm.is_batch(job):
        words = "the allocation ends; what is done is kept, and the same command goes on from here"
        return _Outcome(False, "stopped", "its allocation ended; submit again to go on", words)
    words = f"interrupted by Slurm: job {job} waits in the queue again, and goes on from here"
    return _Outcome(True, "stopped", f"interrupted by Slurm; goes on with job {job}", words)


def _record(run: RunDir, submission: Submission, stages: list[str], outcome: _Outcome) -> None:
    """Write the outcome down as the state of all stages that have not ended well."""
    for stage in stages:
        now = resolve(run, submission, stage)
        if not now.good and (now.state, now.reason) != (outcome.state, outcome.reason):
            set_state(run, stage, submission.id, outcome.state, outcome.reason, now.attempt)


def _let_end(run: RunDir, submission: Submission, seconds: float, ending: Ending) -> None:
    """Ask a training to save, and give it and all other work the time to end."""
    trainings = [job for stage in TRAININGS if (job := submission.job_of(stage)) is not None]
    alive = any(submissions.job_alive(submission, job) for job in trainings)
    if alive and not run.stop_flag.exists():
        atomic.write_text(run.stop_flag, "the allocation ends")
    deadline = time.monotonic() + seconds
    while submissions.live_jobs(submission) and not ending.terminated and time.monotonic() < deadline:
        time.sleep(0.1)


def _has_progress(run: RunDir, submission: Submission, saved_before: int) -> bool:
    """Whether this start brought anything forward: without that, the next one would end where this one does."""
    states = (recorded_state(run, stage) for job in submission.jobs for stage in job.stages)
    done = any(state and state.submission == submission.id and state.state == "done" for state in states)
    return done or saved_steps(run) > saved_before
