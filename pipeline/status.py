"""python -m pipeline.status RUN [--watch]: the stages of a run, their states and results."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError, run_command
from pipeline.run import bad_nodes, endpoint, service_metrics
from pipeline.run.directory import RunDir
from pipeline.run.provenance import check_layout
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.table import render_table
from pipeline.scheduler.view import view_run


def open_run(path: Path) -> RunDir:
    """The run directory at `path`; UserError when there is none."""
    run = RunDir(Path(os.path.abspath(path)))
    if not run.config.is_file():
        raise UserError(f"{path}: not a run directory (no config.yaml); give the folder that --run-dir named")
    check_layout(run)
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 1 when a stage failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.status", description="Show a run's stages.")
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--watch", action="store_true", help="follow until every stage has ended")
    arguments = parser.parse_args(argv)
    run = open_run(arguments.run)
    submission = submissions.read(run)
    if arguments.watch and submission is not None:
        from pipeline.follow import follow

        views = follow(run, submission)
    else:
        views = view_run(run, submission)
        print(f"{arguments.run}" + (f"  submission {submission.id} ({submission.executor})" if submission else ""))
        width = shutil.get_terminal_size((160, 24)).columns
        print(render_table(views, colour=sys.stdout.isatty(), width=width) or "no stage has run yet")
        if endpoint.read_all(run) and (rewards := service_metrics.describe(run)):
            print(rewards)
        for bad in bad_nodes.known(run):
            print(bad_nodes.describe(run, bad))
    return 1 if any(view.state == "failed" for view in views) else 0


if __name__ == "__main__":
    run_command(main)
