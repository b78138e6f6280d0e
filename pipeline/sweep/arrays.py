"""On Slurm, points whose jobs are alike are submitted together: one job array for each job of the chain."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.run.lock import lock
from pipeline.scheduler import arrays
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.arrays import Member
from pipeline.stages.plan import Planned
from pipeline.sweep import share
from pipeline.sweep.place import ENDED_BY_HAND, Place, is_cancelled
from pipeline.sweep.points import read_points


@dataclass(frozen=True)
class _Candidate:
    place: Place
    member: Member
    taken: tuple[str, ...]
    """Stages that it has from the shared run."""


def check_at_once(places: Sequence[Place], at_once: int | None) -> None:
    """UserError where points cannot be held back, or need not be."""
    if at_once is None:
        return
    asked = f"--at-once {at_once}"
    if at_once < 1:
        raise UserError(f"{asked}: no point would run; give 1 or more")
    for cluster in (place.config.cluster for place in places):
        if cluster.executor != "slurm":
            raise UserError(
                f"{asked}: with cluster.executor: {cluster.executor} points take turns anyway; leave it out"
            )
        if not cluster.job_arrays:
            raise UserError(
                f"{asked}: job arrays do that, which cluster.job_arrays: false switches off; leave one of them out"
            )


def show(places: Sequence[Place], shared: Sequence[str], at_once: int | None) -> None:
    """--dry-run: which points would share job arrays, once what is shared is done, and what runs on the login node."""
    from pipeline.submit import plan

    members = []
    for place in places:
        begun = place.run.config.exists()  # before, what it would take of the shared run seems to be missing
        planned = (
            plan(place.run, place.config, place.selected, place.forced)
            if begun
            else [Planned(stage, "run", "") for stage in place.selected]
        )
        elsewhere = (*shared, *place.config.cluster.on_login_node)
        left = tuple(each for each in planned if each.stage not in elsewhere)
        members.append(Member(place.run, place.config, left))
    for group in arrays.alike(members):
        if len(group) > 1 and group[0].jobs:
            print(f"  {_described(group, at_once)}: {', '.join(job.name for job in group[0].jobs)}")


def submit(folder: Path, places: Sequence[Place], shared: RunDir, at_once: int | None) -> dict[str, int]:
    """Submit those points that can share arrays; returns the exit status of each point for which that was all.

    The others, whose jobs are like no other point's, or live already, are for the caller.
    """
    statuses: dict[str, int] = {}
    with contextlib.ExitStack() as locks:
        candidates = []
        for place in places:
            try:
                candidate = _candidate(place, shared, locks)
            except UserError:  # the caller meets it again, and says it
                continue
            if candidate is not None:
                candidates.append(candidate)
        by_run = {each.member.run.root: each for each in candidates}
        groups = arrays.alike([each.member for each in candidates])
        if at_once is not None:
            _say_reach(folder, groups, at_once)
        for group in groups:
            chosen = [by_run[member.run.root] for member in group]
            if len(chosen) > 1:
                if is_cancelled(folder):
                    return dict.fromkeys((each.place.point.name for each in candidates), ENDED_BY_HAND)
                statuses |= _submit_group(folder, chosen, at_once)
            elif at_once is not None:
                print(f"point {chosen[0].place.point.name}: its jobs are like no other's; --at-once does not count it")
    return statuses


def _candidate(place: Place, shared: RunDir, locks: contextlib.ExitStack) -> _Candidate | None:
    """The point with its plan, and locked; None where it has no jobs to submit."""
    from pipeline.submit import plan

    run = place.run
    taken = share.take(shared, run, place.config)
    locks.enter_context(lock(run.submit_lock, "submitting"))
    submissions.recover(run)
    if submissions.busy(run) is not None:
        return None
    planned = plan(run, place.config, place.selected, place.forced)
    if all(each.action == "skip" for each in planned):
        return None
    return _Candidate(place, Member(run, place.config, tuple(planned), place.forced), tuple(taken))


def _say_reach(folder: Path, groups: Sequence[Sequence[Member]], at_once: int) -> None:
    """Each array counts its own tasks only: say so where that is not all that runs of the sweep."""
    several = sum(len(group) > 1 for group in groups)
    root = Path(os.path.abspath(folder))
    queued = sum(submissions.busy(RunDir(root / point.name)) is not None for point in read_points(folder))
    if several > 1 or (several and queued):
        print(
            f"--at-once {at_once} counts in each group of alike points by itself: "
            f"{several} are submitted now, and {queued} points are in the queue already"
        )


def _submit_group(folder: Path, chosen: Sequence[_Candidate], at_once: int | None) -> dict[str, int]:
    from pipeline.submit import say_plan

    names, members = [each.place.point.name for each in chosen], [each.member for each in chosen]
    try:
        submitted = arrays.submit(Path(os.path.abspath(folder)), members, at_once)
    except UserError as fault:
        said = str(fault)
        if arrays.refused(fault):
            if at_once is None:
                print(
                    f"{said}; each point is a chain of its own (cluster.job_arrays: false asks for that)",
                    file=sys.stderr,
                )
                return {}
            said += "; leave --at-once out, and each point is a chain of its own, or give fewer points"
        print(f"error: {said} (points {', '.join(names)})", file=sys.stderr)
        return dict.fromkeys(names, 2)
    for each in chosen:
        print(f"\npoint {each.place.point.name}")
        if each.taken:
            print(f"shared: {', '.join(each.taken)}")
        say_plan(each.place.folder, each.member.plan)
    ids = ", ".join(f"{job.name} ({submissions.array_of(job.job_id or '')})" for job in submitted[0].jobs)
    print(f"submitted as {_described(members, at_once)}: {ids}", flush=True)
    return dict.fromkeys(names, 0)


def _described(group: Sequence[Member], at_once: int | None) -> str:
    limit = f", at most {at_once} at once" if at_once else ""
    return f"job arrays of {len(group)} points{limit}"
