"""python -m pipeline.submit: resolve the configuration, plan, submit the stages as jobs and follow them."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.names import SUMMARY, chosen_preset
from pipeline.errors import UserError, run_command
from pipeline.stages.names import STAGES

if TYPE_CHECKING:  # importing these takes longer than printing --help may
    from pipeline.config.cluster import Cluster
    from pipeline.config.schema import Config
    from pipeline.run.directory import RunDir
    from pipeline.scheduler import allocation
    from pipeline.scheduler.submission import Submission
    from pipeline.scheduler.view import StageView
    from pipeline.stages.plan import Planned

EPILOG = """stages, in order: {stages}

examples:
  python -m pipeline.submit --stage all --preset demo
  python -m pipeline.submit --stage all --preset demo --set data.source=path/to/hh --run-dir runs/hh
  python -m pipeline.submit --stage evaluate --run-dir runs/demo
  CONFIG_NAME=6B python -m pipeline.submit --preset ilql --cluster my-cluster.yaml --dry-run
  python -m pipeline.submit --preset demo --run-dir runs/kl --sweep ppo.init_kl_coef=0.02,0.05,0.1
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.submit",
        description="Run the RLHF pipeline, or single stages of it, as jobs.",
        epilog=EPILOG.format(stages=", ".join(STAGES)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--stage", default="all", metavar="NAME[,NAME]", help="all, or stages joined by commas (default: all)")
    add("--from", dest="start", metavar="NAME", help="leave out the stages before this one")
    add("--until", metavar="NAME", help="leave out the stages after this one")
    add(
        "--preset",
        metavar="NAME",
        help=f"where the configuration starts (default: the run's, $CONFIG_NAME or gptj): {SUMMARY}",
    )
    add("--run-dir", type=Path, metavar="DIR", help="where everything goes (default: runs/<preset>)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, as in ppo.lam=0.9")
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2,...",
        help="one run for each value, below --run-dir; with several, for each combination",
    )
    add(
        "--at-once",
        type=int,
        metavar="N",
        help="with --sweep on Slurm: of each group of alike points at most N run a stage at the same time",
    )
    add("--cluster", metavar="NAME|FILE", help="cluster profile: a name in slurm/, or a YAML file (default: local)")
    add("--force", action="store_true", help="run the chosen stages even where they are up to date")
    add("--dry-run", action="store_true", help="print the plan and every command line; change nothing")
    add("--no-follow", action="store_true", help="return as soon as the jobs are submitted")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 when all chosen stages are done, 1 when one failed."""
    arguments = build_parser().parse_args(argv)
    from pipeline.config.checks import check_selected
    from pipeline.run import provenance
    from pipeline.run.directory import RunDir
    from pipeline.scheduler import script
    from pipeline.stages.names import select_stages

    def select(config: Config) -> tuple[str, ...]:
        selected = select_stages(arguments.stage, config.all, arguments.start, arguments.until)
        check_selected(config, selected)
        return selected

    run_dir = arguments.run_dir or Path("runs") / chosen_preset(arguments.preset)
    if arguments.sweep:
        return _sweep(arguments, arguments.run_dir or run_dir.with_name(f"{run_dir.name}-sweep"), select)
    if arguments.at_once is not None:
        raise UserError(f"--at-once {arguments.at_once}: it is for the points of a --sweep; leave it out")
    run = RunDir(Path(os.path.abspath(run_dir)))
    script.check_path(run.root)
    provenance.check_layout(run)
    config = resolve_config(run, arguments.preset, arguments.set, arguments.cluster)
    selected = select(config)
    forced = selected if arguments.force else ()
    if arguments.dry_run:
        from pipeline.dry_run import show_plan

        show_plan(run, config, plan(run, config, selected, forced))
        return 0
    return submit_one(run_dir, config, selected, forced, arguments.no_follow)


def _sweep(arguments: argparse.Namespace, folder: Path, select: Callable[[Config], tuple[str, ...]]) -> int:
    """One run a point; see pipeline.sweep."""
    from pipeline.sweep.points import make_points, preset_of
    from pipeline.sweep.submit import resolve_points, show_points, submit_points

    def resolve(run: RunDir, overrides: Sequence[str]) -> Config:
        preset = arguments.preset or (None if run.config.exists() else preset_of(folder))
        return resolve_config(run, preset, [*arguments.set, *overrides], arguments.cluster)

    places = resolve_points(folder, make_points(arguments.sweep), resolve, select)
    if arguments.dry_run:
        show_points(folder, places, arguments.force, arguments.at_once)
        return 0
    options = arguments.force, arguments.no_follow
    return submit_points(folder, places, *options, submit_one, follow_one, arguments.at_once)


def submit_one(
    run_dir: Path, config: Config, selected: Sequence[str], forced: Sequence[str], no_follow: bool = False
) -> int:
    """Submit what has to run of the selected stages, and follow it; returns the command's exit status."""
    started = time.monotonic()
    from pipeline.run.directory import RunDir
    from pipeline.run.lock import lock
    from pipeline.scheduler import allocation, slurm
    from pipeline.scheduler import submission as submissions
    from pipeline.scheduler.submit import divide, refuse_other_config, submit

    run = RunDir(Path(os.path.abspath(run_dir)))
    shown = shlex.quote(str(run_dir))
    ending = _enter_allocation(run, config.cluster, no_follow)
    mine = True  # the jobs to follow, and not another submitter's
    while True:
        with lock(run.submit_lock, "submitting"):
            submissions.recover(run)
            current = submissions.busy(run)
            if current is not None:
                refuse_other_config(run, config)
                print(f"jobs of {shown} are running already; following them")
                mine = False
            else:
                earlier = allocation.earlier_start(run, forced) if ending is not None else None
                planned = plan(run, config, selected, submissions.still_forced(run, forced, earlier))
                if all(each.action == "skip" for each in planned):
                    _say_nothing_to_do(run_dir, planned, time.monotonic() - started)
                    return 0
                say_plan(run_dir, planned)
                here, rest = divide(config, planned)
                current = submit(run, config, here or rest, forced, "local" if here else None, earlier)
        if current.executor == config.cluster.executor:
            break
        # Stages that run here first. What they made may change what the others have to do: plan again.
        status = _follow(run, run_dir, current)
        selected = tuple(stage for stage in selected if current.job_of(stage) is None)
        forced = tuple(stage for stage in forced if stage in selected)
        if status != 0 or not selected:
            if selected:
                print("nothing else has been submitted: the same command does that once they are done", file=sys.stderr)
            return status
    if ending is not None and mine:
        return _follow_inside(run, run_dir, current, config.cluster, ending)
    if no_follow or (current.executor == "slurm" and slurm.on_a_node()):
        ids = ", ".join(f"{job.name} ({job.job_id})" for job in current.jobs)
        print(f"submitted: {ids}\nfollow with: python -m pipeline.status {shown} --watch")
        return 0  # a job that follows others would hold its node for nothing
    return _follow(run, run_dir, current)


def follow_one(run_dir: Path) -> int:
    """Follow what was last submitted of a run; returns the command's exit status."""
    from pipeline.run.directory import RunDir
    from pipeline.scheduler import submission as submissions

    run = RunDir(Path(os.path.abspath(run_dir)))
    submission = submissions.read(run)
    return 0 if submission is None else _follow(run, run_dir, submission)


def resolve_config(run: RunDir, preset: str | None, overrides: Sequence[str], cluster: str | None) -> Config:
    """The configuration: a preset, or what the run directory holds, with overrides and cluster laid on it."""
    from pipeline.config import load

    if preset is None and run.config.exists():
        return load.resolve(load.load_yaml(run.config), overrides, cluster, str(run.config))
    name = chosen_preset(preset)
    return load.resolve({**load.load_preset(name), "preset": name}, overrides, cluster)


def plan(run: RunDir, config: Config, selected: Sequence[str], forced: Sequence[str]) -> list[Planned]:
    """Plan the selected stages against what the run directory holds."""
    from pipeline.run.hashing import HashCache
    from pipeline.scheduler import needs
    from pipeline.stages.base import Context
    from pipeline.stages.plan import make_plan

    context = Context(run, config, HashCache(run.root / "cache" / "hashes.json"))
    return needs.apply(run, config.cluster, make_plan(context, selected, forced, os.environ))


def _say_nothing_to_do(run_dir: Path, planned: Sequence[Planned], seconds: float) -> None:
    from pipeline.run.directory import RunDir
    from pipeline.stages.registry import REGISTRY

    run = RunDir(run_dir)
    print(f"{run_dir}: nothing to do, every stage is up to date ({seconds:.1f} s)")
    for each in planned:
        values = run.values(each.stage)
        print(f"  {each.stage:<13}{REGISTRY[each.stage].headline(values) if values else each.reason}")


def say_plan(run_dir: Path, planned: Sequence[Planned]) -> None:
    """What is to run, and why."""
    print(f"{run_dir}: {sum(each.action != 'skip' for each in planned)} of {len(planned)} stages to run")
    for each in planned:
        print(f"  {each.stage:<13}{each.action:<7}{each.reason}")
    print(flush=True)


def _enter_allocation(run: RunDir, cluster: Cluster, no_follow: bool) -> allocation.Ending | None:
    """Where jobs run inside an allocation, make sure that there is one around, and listen for its end from now on."""
    from pipeline.scheduler import allocation

    if cluster.executor != "allocation":
        return None
    here = allocation.surrounding()
    if no_follow:
        raise UserError("--no-follow: jobs inside an allocation end with the command that started them; leave it out")
    return allocation.Ending(run, here, cluster.requeue)


def _follow(run: RunDir, run_dir: Path, submission: Submission) -> int:
    from pipeline.follow import follow

    shown = shlex.quote(str(run_dir))
    try:
        views = follow(run, submission)
    except KeyboardInterrupt:
        print(
            f"\nthe jobs go on; follow them with: python -m pipeline.status {shown} --watch\n"
            f"stop them with: python -m pipeline.cancel {shown}"
        )
        return 130
    return _report(run, run_dir, submission, views)


def _follow_inside(
    run: RunDir, run_dir: Path, submission: Submission, cluster: Cluster, ending: allocation.Ending
) -> int:
    """Follow jobs that end with this process; on Slurm's word, or a Ctrl-C, end them in order."""
    from pipeline.follow import follow
    from pipeline.scheduler import allocation
    from pipeline.scheduler.submission import live_jobs

    views: list[StageView] = []
    ending.following = True
    try:
        views = follow(run, submission, lambda: bool(ending))
        while live_jobs(submission) and not ending:  # a server on its own goes on
            time.sleep(0.5)
    except KeyboardInterrupt:
        ending.by_hand = True
    if not ending or (views and all(view.ended for view in views)):
        return _report(run, run_dir, submission, views)
    print(f"{run_dir}: {allocation.wind_up(run, submission, cluster, ending)}", file=sys.stderr)
    return allocation.ENDED


def _report(run: RunDir, run_dir: Path, submission: Submission, views: Sequence[StageView]) -> int:
    """Say how the followed stages ended; the command's exit status."""
    shown = shlex.quote(str(run_dir))
    bad = [view for view in views if view.state in ("failed", "cancelled", "stopped")]
    for view in bad:
        if view.state == "failed":
            print(f"error: {view.stage}: {view.detail}", file=sys.stderr)
            print(f"see: python -m pipeline.logs {shown} {view.stage}", file=sys.stderr)
    if bad:
        print("the same command goes on from here", file=sys.stderr)
        return 1
    if submission.job_of("evaluate") is not None:
        _say_result(run, run_dir)
    return 0


def _say_result(run: RunDir, run_dir: Path) -> None:
    """After a finished evaluation: the headline and where to look."""
    outputs = run.outputs("evaluate")
    if outputs is None:
        return
    from pipeline.result import render_summary

    print(render_summary(run, run_dir, outputs))


if __name__ == "__main__":

    def _main() -> int:
        try:
            return main()
        except OSError as error:
            if error.filename is None:
                raise
            raise UserError(f"{error.filename}: {error.strerror}") from error

    run_command(_main)
