"""Submitting a sweep: what the points share first, then each point: here one after another, on Slurm all at once."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.scheduler import allocation, script, slurm
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.submit import divide
from pipeline.sweep import arrays, share
from pipeline.sweep.place import ENDED_BY_HAND, Place, SubmitOne, is_cancelled
from pipeline.sweep.points import SHARED, STOP, Point, remember


def resolve_points(
    folder: Path,
    points: Sequence[Point],
    resolve: Callable[[RunDir, Sequence[str]], Config],
    select: Callable[[Config], tuple[str, ...]],
) -> list[Place]:
    """Check every point before anything is submitted; each different fault is one line, the last a UserError."""
    root = RunDir(Path(os.path.abspath(folder)))
    script.check_path(root.root)
    if root.config.exists():
        raise UserError(f"--run-dir {folder}: is a run by itself; a sweep takes a folder of its own")
    places, faults = [], dict[str, str]()
    for point in points:
        place = folder / point.name
        try:
            config = resolve(RunDir(root.root / point.name), point.overrides)
            selected = select(config)
            if "serve" in selected and "train" not in selected:
                raise UserError("--stage serve: a server by itself has no result to sweep; leave it out")
            places.append(Place(point, place, config, selected))
        except UserError as fault:
            faults.setdefault(str(fault), point.name)
    lines = [f"{fault} (point {name})" for fault, name in faults.items()]
    for line in lines[:-1]:
        print(f"error: {line}", file=sys.stderr)
    if lines:
        raise UserError(lines[-1])
    return places


def show_points(folder: Path, places: Sequence[Place], force: bool, at_once: int | None = None) -> None:
    """--dry-run: what would run where. Writes nothing."""
    arrays.check_at_once(places, at_once)
    shared = _shared_stages(folder, places)
    print(f"sweep in {folder}: {len(places)} points (cluster {places[0].config.cluster.name})")
    if shared:
        print(f"  {SHARED}: {', '.join(shared)}, once for all points")
    for place in places:
        print(f"  {place.point.name}: {', '.join(stage for stage in place.selected if stage not in shared)}")
    if places[0].config.cluster.executor == "slurm":
        arrays.show(_forced(places, shared, force), shared, at_once)


def submit_points(
    folder: Path,
    places: Sequence[Place],
    force: bool,
    no_follow: bool,
    one: SubmitOne,
    follow: Callable[[Path], int],
    at_once: int | None = None,
) -> int:
    """Run the sweep; returns 0 when all that was followed went well."""
    arrays.check_at_once(places, at_once)
    executor = places[0].config.cluster.executor
    if no_follow and executor == "local":
        raise UserError("--no-follow: points on this machine run one after another; leave it out")
    shared = _shared_stages(folder, places)
    remember(folder, [place.point for place in places])
    (folder / STOP).unlink(missing_ok=True)
    if shared:
        status = _run_shared(folder, places[0], shared, shared if force else (), no_follow, one)
        if status is not None:
            return status
    left = _forced(places, shared, force)
    statuses: dict[str, int] = {}
    if executor == "slurm":
        statuses = _run_here(folder, left, one)
        if ENDED_BY_HAND not in statuses.values():
            waiting = [place for place in left if place.point.name not in statuses]
            statuses |= arrays.submit(folder, waiting, _shared_run(folder), at_once)
        if ENDED_BY_HAND in statuses.values():
            return ENDED_BY_HAND
    waiting = [place for place in left if place.point.name not in statuses]
    ended = _submit_each(folder, waiting, statuses, no_follow or executor == "slurm", one)
    if ended is not None:
        return ended
    if executor == "slurm" and not no_follow and not slurm.on_a_node():
        for place in places:
            name = place.point.name
            if statuses.get(name) != 0:
                continue
            print(f"\npoint {name}", flush=True)
            statuses[name] = follow(place.folder)
            if statuses[name] == ENDED_BY_HAND:
                return ENDED_BY_HAND
    from pipeline.sweep.results import write_table

    print(f"\n{write_table(folder)}\nagain: python -m pipeline.sweep {shlex.quote(str(folder))}")
    return max(statuses.values())


def _forced(places: Sequence[Place], shared: Sequence[str], force: bool) -> list[Place]:
    """The points with what --force has them redo: not what is shared."""
    if not force:
        return list(places)
    return [replace(each, forced=tuple(stage for stage in each.selected if stage not in shared)) for each in places]


def _run_here(folder: Path, places: list[Place], one: SubmitOne) -> dict[str, int]:
    """Run the points' stages of the login node: what they make may change what else there is to do. Of the points in
    `places` stays what is left to do; returns the exit status of each for which that was all."""
    from pipeline.submit import plan

    statuses: dict[str, int] = {}
    for index, place in enumerate(places):
        name, run, config = place.point.name, place.run, place.config
        if not config.cluster.on_login_node:
            continue
        try:
            taken = share.take(_shared_run(folder), run, config)
            if submissions.busy(run) is not None:
                continue
            here = [each.stage for each in divide(config, plan(run, config, place.selected, place.forced))[0]]
            if not here:
                continue
            if is_cancelled(folder):
                return {**statuses, name: ENDED_BY_HAND}
            _say_point(place, taken)
            status = one(place.folder, config, here, [stage for stage in place.forced if stage in here], False)
        except UserError as fault:
            statuses[name] = _say_fault(place, fault)
            continue
        selected = tuple(stage for stage in place.selected if stage not in here)
        forced = tuple(stage for stage in place.forced if stage not in here)
        places[index] = replace(place, selected=selected, forced=forced)
        if status != 0 or not selected:
            statuses[name] = status
        if status == ENDED_BY_HAND:
            return statuses
    return statuses


def _submit_each(
    folder: Path, places: Sequence[Place], statuses: dict[str, int], no_follow: bool, one: SubmitOne
) -> int | None:
    """Submit points as the runs that they are, and note how each ended; one that cannot run keeps none of the others
    from it. Returns the command's exit status where it ends here."""
    for index, place in enumerate(places):
        if is_cancelled(folder):
            return ENDED_BY_HAND
        name = place.point.name
        try:
            _say_point(place, share.take(_shared_run(folder), place.run, place.config))
            statuses[name] = one(place.folder, place.config, place.selected, place.forced, no_follow)
        except UserError as fault:
            statuses[name] = _say_fault(place, fault)
            left = [each.point.name for each in places[index + 1 :]]
            if left and script.queue_full(fault):
                print(
                    f"not submitted: {', '.join(left)}; the same command does that once there is room in the queue",
                    file=sys.stderr,
                )
                return None
        if statuses[name] in (ENDED_BY_HAND, allocation.ENDED):
            return statuses[name]
    return None


def _say_point(place: Place, taken: Sequence[str]) -> None:
    print(f"\npoint {place.point.name}", flush=True)
    if taken:
        print(f"shared: {', '.join(taken)}", flush=True)


def _say_fault(place: Place, fault: UserError) -> int:
    print(f"error: {fault} (point {place.point.name})", file=sys.stderr)
    return 2


def _run_shared(
    folder: Path, place: Place, stages: tuple[str, ...], forced: tuple[str, ...], no_follow: bool, one: SubmitOne
) -> int | None:
    """Run the shared stages; the command's exit status where it ends here, None to go on with the points."""
    from pipeline.submit import plan

    print(f"{SHARED} by all points: {', '.join(stages)}", flush=True)
    run = _shared_run(folder)
    status = one(folder / SHARED, place.config, stages, forced, no_follow)
    if status != 0:
        return status
    if any(each.action != "skip" for each in plan(run, place.config, stages, ())):
        print("no point has been submitted: the same command does that once these are done", file=sys.stderr)
        return 0
    return None


def _shared_run(folder: Path) -> RunDir:
    return RunDir(Path(os.path.abspath(folder / SHARED)))


def _shared_stages(folder: Path, places: Sequence[Place]) -> tuple[str, ...]:
    """What runs once; empty where the points do not run the same stages."""
    if len({place.selected for place in places}) > 1:
        return ()
    configs = [place.config for place in places]
    return share.shared_stages(_shared_run(folder), configs, places[0].selected)
