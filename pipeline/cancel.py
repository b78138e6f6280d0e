"""python -m pipeline.cancel RUN: end a run's jobs and every process of theirs; of a sweep, those of all its points."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import procs
from pipeline.errors import UserError, run_command
from pipeline.run import atomic, endpoint
from pipeline.run.directory import RunDir
from pipeline.run.lock import lock
from pipeline.scheduler import queue, slurm
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.state import resolve, set_state
from pipeline.scheduler.submission import Submission
from pipeline.status import open_run
from pipeline.sweep.points import POINTS, SHARED, STOP, read_points


@dataclass(frozen=True)
class _Open:
    """A submission that may have something to end."""

    submission: Submission
    stages: tuple[str, ...]
    """Those that have not ended."""
    ids: tuple[str, ...]
    """Its jobs in Slurm's queue."""


def cancel(run: RunDir, grace_s: float) -> list[str]:
    """End all jobs of the run, a server on its own included; returns the stages that were ended."""
    return _end(run, _look(run), grace_s)


def _end(run: RunDir, found: Sequence[_Open], grace_s: float) -> list[str]:
    return [stage for each in found for stage in _cancel(run, each, grace_s)]


def _look(run: RunDir) -> list[_Open]:
    submissions.recover(run)
    found = []
    for submission in (submissions.read(run, service) for service in (False, True)):
        if submission is not None:
            stages = [stage for job in submission.jobs for stage in job.stages]
            live = submissions.live_jobs(submission) if submission.executor == "slurm" else []
            found.append(
                _Open(
                    submission,
                    tuple(stage for stage in stages if not resolve(run, submission, stage).ended),
                    tuple(job.job_id for job in live if job.job_id),
                )
            )
    return found


def _cancel(run: RunDir, found: _Open, grace_s: float) -> tuple[str, ...]:
    submission = found.submission
    if submission.executor == "slurm":
        slurm.cancel(list(queue.ask(found.ids)))
        _wait_for_slurm(found.ids, grace_s)
    else:
        _end_local(run, submission, grace_s)
    for stage in found.stages:
        if not resolve(run, submission, stage).ended or resolve(run, submission, stage).state == "failed":
            set_state(run, stage, submission.id, "cancelled", "by pipeline.cancel")
    if submission.executor != "slurm":
        endpoint.withdraw(run)
    return found.stages


def _wait_for_slurm(ids: Sequence[str], grace_s: float) -> None:
    deadline = time.monotonic() + grace_s
    while queue.ask(ids) and time.monotonic() < deadline:
        time.sleep(0.5)


def _end_local(run: RunDir, submission: Submission, grace_s: float) -> None:
    """TERM to the jobs, so that the trainer can save; after the grace time KILL to everything that bears the mark."""
    live = submissions.live_jobs(submission)
    for job in live:
        if job.process is not None and not job.process.here:
            if submission.allocation is not None and slurm.is_batch(submission.allocation):
                slurm.cancel([submission.allocation])  # its script is the submitter, and the jobs end with it
                _wait_for_slurm([submission.allocation], grace_s)
                return
            raise UserError(f"{run.root}: its jobs are processes of {job.process.host}; run pipeline.cancel there")
    # Last jobs first: a waiting one must not take its parent's end for a reason to start.
    for job in reversed(live):
        assert job.process is not None
        procs.terminate(job.process)
    deadline = time.monotonic() + grace_s
    with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C: no more grace
        while submissions.live_jobs(submission) and time.monotonic() < deadline:
            time.sleep(0.1)
    if not submissions.service_alive(run):  # it has its own turn, and its own grace
        procs.end_marked(run.root, grace_s=0.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.cancel", description="End a run's jobs.")
    parser.add_argument("run", type=Path, help="the run directory, or the folder of a sweep")
    parser.add_argument("--grace", type=float, default=30.0, metavar="S", help="seconds to save and stop (default: 30)")
    arguments = parser.parse_args(argv)
    if (arguments.run / POINTS).exists():  # first of all, or its submitter hands over the next point meanwhile
        atomic.write_text(arguments.run / STOP, "")
    faults = 0
    with contextlib.ExitStack() as locks:
        found: dict[RunDir, list[_Open]] = {}
        for run in _runs(arguments.run):
            try:
                locks.enter_context(lock(run.submit_lock, "cancelling"))
                found[run] = _look(run)
            except UserError as fault:
                faults += _say(fault)
        if len(found) > 1:  # at once, lest each point wait for the grace of those before it
            with contextlib.suppress(UserError):  # its own turn, below, says what is refused
                slurm.cancel([job for opened in found.values() for each in opened for job in each.ids])
        for run, opened in found.items():
            try:
                ended = _end(run, opened, arguments.grace)
            except UserError as fault:
                faults += _say(fault)
                continue
            name = os.path.relpath(run.root)
            print(f"{name}: cancelled {', '.join(ended)}" if ended else f"{name}: nothing was running", flush=True)
    return 2 if faults else 0


def _say(fault: UserError) -> int:
    """One run that cannot be cancelled keeps none of the others running."""
    print(f"error: {fault}", file=sys.stderr)
    return 1


def _runs(folder: Path) -> list[RunDir]:
    """The run, or those of a sweep that were submitted, or are being submitted now: the last first, for what ends lets
    the next one start."""
    if not (folder / POINTS).exists():
        return [open_run(folder)]
    names = [SHARED, *(point.name for point in read_points(folder))]
    runs = [RunDir(Path(os.path.abspath(folder / name))) for name in reversed(names)]
    begun = [run for run in runs if run.config.exists() or run.submit_lock.exists()]
    return [open_run(run.root) if run.config.exists() else run for run in begun]


if __name__ == "__main__":
    run_command(main)
