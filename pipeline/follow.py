"""Follow a run's jobs to their end: a live table on a terminal, one line a change elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable

from pipeline.run.directory import RunDir
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.submission import Submission, job_alive
from pipeline.scheduler.table import render_line, render_table
from pipeline.scheduler.view import StageView, view_run

_LINE_EVERY_S = 10.0
_END_S = 10.0


def follow(run: RunDir, submission: Submission, leave: Callable[[], bool] = lambda: False) -> list[StageView]:
    """Show the submission's stages until all have ended, or `leave` says to; return how they are then."""
    show = _follow_terminal if sys.stdout.isatty() else _follow_lines
    views = show(run, submission, leave)
    if not leave():
        _wait_for_processes(submission)
    return views


def _wait_for_processes(submission: Submission) -> None:
    """Local jobs write their last state a moment before their processes end; leave when those are gone too."""
    deadline = time.monotonic() + _END_S
    jobs = [job for job in submission.jobs if job.stages != ("serve",)]
    while submission.executor != "slurm" and time.monotonic() < deadline:
        if not any(job_alive(submission, job) for job in jobs):
            return
        time.sleep(0.05)


def _stages(run: RunDir, submission: Submission) -> list[StageView]:
    current = submissions.read(run, submission.service) or submission
    if current.id != submission.id:  # another submission took over; its jobs are what there is to see
        submission = current
    return [view for view in view_run(run, current) if submission.job_of(view.stage)]


def _over(views: list[StageView]) -> bool:
    """A server that runs on its own does not end; all else must."""
    return all(view.ended or (view.stage == "serve" and "TRITON_HOST=" in view.detail) for view in views)


def _follow_terminal(run: RunDir, submission: Submission, leave: Callable[[], bool]) -> list[StageView]:
    shown = 0
    while True:
        views = _stages(run, submission)
        columns = shutil.get_terminal_size().columns
        up = f"\x1b[{shown}A\x1b[J" if shown else ""
        text = render_table(views, colour=True, width=columns - 1)
        sys.stdout.write(f"{up}{text}\n")
        sys.stdout.flush()
        # Long reasons wrap: count the lines as the terminal breaks them.
        shown = sum(1 + (len(line) - 1) // columns for line in render_table(views, False, columns - 1).splitlines())
        if _over(views) or leave():
            return views
        time.sleep(0.5)


def _follow_lines(run: RunDir, submission: Submission, leave: Callable[[], bool]) -> list[StageView]:
    states: dict[str, tuple[str, str]] = {}
    printed: dict[str, float] = {}
    while True:
        views = _stages(run, submission)
        for view in views:
            waits = view.state in ("pending", "waiting")
            if waits and not view.detail and not view.stuck:  # else it was interrupted, tries again, or waits in vain
                continue
            key = (view.state, view.queue if view.stuck else view.detail if view.stage == "serve" or waits else "")
            now = time.monotonic()
            changed = states.get(view.stage) != key
            if changed or (view.state == "running" and view.total and now - printed[view.stage] > _LINE_EVERY_S):
                print(render_line(view, colour=False, width=160), flush=True)
                states[view.stage], printed[view.stage] = key, now
        if _over(views) or leave():
            return views
        time.sleep(0.25)
