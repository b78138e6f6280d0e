"""Submitting a sweep: what the points share first, then each point: here one after another, on Slurm all at once."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.scheduler import allocation, script, slurm
from pipeline.sweep import arrays, share
from pipeline.sweep.place import ENDED_BY_HAND, Place, SubmitOne
from pipeline.sweep.points import SHARED, Point, remember


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


def show_points(folder: Path, places: Sequence[Place], at_once: int | None = None) -> None:
    """--dry-run: what would run where. Writes nothing."""
    arrays.check_at_once(places, at_once)
    shared = _shared_stages(folder, places)
    print(f"sweep in {folder}: {len(places)} points (cluster {places[0].config.cluster.name})")
    if shared:
        print(f"  {SHARED}: {', '.join(shared)}, once for all points")
    for place in places:
        print(f"  {place.point.name}: {', '.join(stage for stage in place.selected if stage not in shared)}")
    if places[0].config.cluster.executor == "slurm":
        arrays.show(places, shared, at_once)


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
    if shared:
        status = _run_shared(folder, places[0], shared, shared if force else (), no_follow, one)
        if status is not None:
            return status
    forced = {
        place.point.name: tuple(stage for stage in place.selected if stage not in shared) if force else ()
        for place in places
    }
    statuses: dict[str, int] = {}
    if executor == "slurm":
        statuses = arrays.submit(folder, places, _shared_run(folder), forced, at_once, one)
        if ENDED_BY_HAND in statuses.values():
            return ENDED_BY_HAND
    for place in places:
        name = place.point.name
        if name not in statuses:
            statuses[name] = _submit_alone(folder, place, forced[name], no_follow or executor == "slurm", one)
        if statuses[name] in (ENDED_BY_HAND, allocation.ENDED):
            return statuses[name]
    if executor == "slurm" and not no_follow and not slurm.on_a_node():
        for place in places:
            name = place.point.name
            if statuses[name] != 0:
                continue
            print(f"\npoint {name}", flush=True)
            statuses[name] = follow(place.folder)
            if statuses[name] == ENDED_BY_HAND:
                return ENDED_BY_HAND
    from pipeline.sweep.results import write_table

    print(f"\n{write_table(folder)}\nagain: python -m pipeline.sweep {shlex.quote(str(folder))}")
    return max(statuses.values())


def _submit_alone(folder: Path, place: Place, forced: tuple[str, ...], no_follow: bool, one: SubmitOne) -> int:
    """Submit a point as the run that it is; a point that cannot run keeps none of the others from it."""
    print(f"\npoint {place.point.name}", flush=True)
    try:
        if taken := share.take(_shared_run(folder), place.run, place.config):
            print(f"shared: {', '.join(taken)}")
        return one(place.folder, place.config, place.selected, forced, no_follow)
    except UserError as fault:
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
