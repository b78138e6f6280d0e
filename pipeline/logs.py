"""python -m pipeline.logs RUN STAGE [-f]: what a stage's work printed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError, nearest, run_command
from pipeline.run.directory import RunDir
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.state import resolve
from pipeline.stages.names import STAGES
from pipeline.status import open_run


def log_path(run: RunDir, stage: str, attempt: int | None) -> Path:
    """The log of an attempt (by default the last one); of the server for `serve`."""
    if stage not in STAGES:
        raise UserError(f"{stage}: unknown stage{nearest(stage, STAGES)}; stages: {', '.join(STAGES)}")
    if stage == "serve":
        path = run.stage("serve") / "tritonserver.log"
    else:
        attempts = run.stage(stage) / "attempts"
        numbers = sorted(int(folder.name) for folder in attempts.glob("[0-9]*")) if attempts.is_dir() else []
        if not numbers and attempt is None and (early := _job_log(run, stage)) is not None:
            return early
        if not numbers or (attempt is not None and attempt not in numbers):
            what = f"has no attempt {attempt}" if numbers else "has not run yet"
            raise UserError(f"{stage}: {what} in {run.root}; see python -m pipeline.status")
        path = run.attempt(stage, attempt or numbers[-1]) / "stdout.log"
    if not path.exists():
        raise UserError(f"{path}: no log yet; see python -m pipeline.status")
    return path


def _job_log(run: RunDir, stage: str) -> Path | None:
    """The output of the stage's latest job, which says why it ended before it could start an attempt."""
    jobs = [path for path in (run.root / "jobs").glob("*/*_log.err") if stage in path.parent.name.split("-", 3)[-1]]
    return max(jobs, key=lambda path: path.stat().st_mtime, default=None)


def has_ended(run: RunDir, stage: str) -> bool:
    """Whether nothing more will be written to the stage's log: it ended, or its job died."""
    for service in (False, True):
        submission = submissions.read(run, service)
        if submission is not None and submission.job_of(stage) is not None:
            return resolve(run, submission, stage).ended
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Print the log; with -f go on until the stage has ended."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.logs", description="Print a stage's log.")
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("stage", help="the stage's name; serve prints tritonserver's log")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the stage has ended")
    parser.add_argument("--attempt", type=int, help="an earlier attempt's log")
    arguments = parser.parse_args(argv)
    run = open_run(arguments.run)
    with log_path(run, arguments.stage, arguments.attempt).open("rb") as file:
        while True:
            # Asked before reading: what is written after the end of the stage is still printed.
            over = not arguments.follow or has_ended(run, arguments.stage)
            while block := file.read(1 << 16):
                sys.stdout.buffer.write(block)
            sys.stdout.flush()
            if over:
                return 0
            time.sleep(0.3)


if __name__ == "__main__":
    run_command(main)
