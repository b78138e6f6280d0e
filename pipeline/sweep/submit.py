"""Submitting a sweep: what the points share first, then each point: here one after another, on Slurm all at once."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.scheduler import allocation, script, slurm
from pipeline.sweep import share
from pipeline.sweep.points import SHARED, Point, remember

ENDED_BY_HAND = 130


class SubmitOne(Protocol):
    """What submits one run, and follows it unless told not to; returns the command's exit status."""

    def __call__(
        self, run_dir: Path, config: Config, selected: Sequence[str], forced: Sequence[str], no_follow: bool
    ) -> int: ...


@dataclass(frozen=True)
class Place:
    """A point with its folder and its checked configuration."""

    point: Point
    folder: Path
    config: Config
    selected: tuple[str, ...]

    @property
    def run(self) -> RunDir:
        return RunDir(Path(os.path.abspath(self.folder)))


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


def show_points(folder: Path, places: Sequence[Place]) -> None:
    """--dry-run: what would run where. Writes nothing."""
    shared = _shared_stages(folder, places)
    print(f"sweep in {folder}: {len(places)} points (cluster {places[0].config.cluster.name})")
    if shared:
        print(f"  {SHARED}: {', '.join(shared)}, once for all points")
    for place in places:
        print(f"  {place.point.name}: {', '.join(stage for stage in place.selected if stage not in shared)}")


def submit_points(
    folder: Path,
    places: Sequence[Place],
    force: bool,
    no_follow: bool,
    one: SubmitOne,
    follow: Callable[[Path], int],
) -> int:
    """Run the sweep; returns 0 when all that was followed went well."""
    executor = places[0].config.cluster.executor
    if no_follow and executor == "local":
        raise UserError("--no-follow: points on this machine run one after another; leave it out")
    shared = _shared_stages(folder, places)
    remember(folder, [place.point for place in places])
    if shared:
        status = _run_shared(folder, places[0], shared, shared if force else (), no_follow, one)
        if status is not None:
            return status
    statuses = []
    for place in places:
        print(f"\npoint {place.point.name}", flush=True)
        forced = tuple(stage for stage in place.selected if stage not in shared) if force else ()
        try:
            if taken := share.take(_shared_run(folder), place.run, place.config):
                print(f"shared: {', '.join(taken)}")
            statuses.append(one(place.folder, place.config, place.selected, forced, no_follow or executor == "slurm"))
        except UserError as fault:  # a point that cannot run keeps none of the others from it
            print(f"error: {fault} (point {place.point.name})", file=sys.stderr)
            statuses.append(2)
        if statuses[-1] in (ENDED_BY_HAND, allocation.ENDED):
            return statuses[-1]
    if executor == "slurm" and not no_follow and not slurm.on_a_node():
        for place, submitted in zip(places, tuple(statuses), strict=True):
            if submitted == 2:
                continue
            print(f"\npoint {place.point.name}", flush=True)
            statuses.append(follow(place.folder))
            if statuses[-1] == ENDED_BY_HAND:
                return ENDED_BY_HAND
    from pipeline.sweep.results import write_table

    print(f"\n{write_table(folder)}\nagain: python -m pipeline.sweep {shlex.quote(str(folder))}")
    return max(statuses)


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
