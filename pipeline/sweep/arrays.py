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
from pipeline.scheduler.submit import divide
from pipeline.stages.plan import Planned
from pipeline.sweep import share
from pipeline.sweep.place import ENDED_BY_HAND, Place, SubmitOne


@dataclass(frozen=True)
class _Candidate:
    place: Place
    member: Member
    taken: tuple[str, ...]
    """Stages that it has from the shared run."""


def check_at_once(places: Sequence[Place], at_once: int | None) -> None:
    """UserError where points cannot be held back, or need not be."""
    cluster, asked = places[0].config.cluster, f"--at-once {at_once}"
    if at_once is None:
        return
    if at_once < 1:
        raise UserError(f"{asked}: no point would run; give 1 or more")
    if cluster.executor != "slurm":
        raise UserError(f"{asked}: with cluster.executor: {cluster.executor} points take turns anyway; leave it out")
    if not cluster.job_arrays:
        raise UserError(
            f"{asked}: job arrays do that, which cluster.job_arrays: false switches off; leave one of them out"
        )


def show(places: Sequence[Place], shared: Sequence[str], at_once: int | None) -> None:
    """--dry-run: which points would share job arrays, were nothing done yet but what is shared."""
    members = []
    for place in places:
        planned = [Planned(stage, "run", "") for stage in place.selected if stage not in shared]
        members.append(Member(place.run, place.config, tuple(divide(place.config, planned)[1])))
    for group in arrays.alike(members):
        if len(group) > 1 and group[0].jobs:
            print(f"  {_described(group, at_once)}: {', '.join(job.name for job in group[0].jobs)}")


def submit(
    folder: Path,
    places: Sequence[Place],
    shared: RunDir,
    forced: dict[str, tuple[str, ...]],
    at_once: int | None,
    one: SubmitOne,
) -> dict[str, int]:
    """Submit those points that can share arrays; returns the exit status of each point for which that was all.

    The others, whose jobs are like no other point's, or live already, are for the caller.
    """
    statuses: dict[str, int] = {}
    with contextlib.ExitStack() as locks:
        candidates = []
        for place in places:
            name = place.point.name
            try:
                candidate = _candidate(place, shared, forced[name], one, locks)
            except UserError:  # the caller meets it again, and says it
                continue
            if isinstance(candidate, int):
                statuses[name] = candidate
                if candidate == ENDED_BY_HAND:
                    return statuses
            elif candidate is not None:
                candidates.append(candidate)
        by_run = {each.member.run.root: each for each in candidates}
        for group in arrays.alike([each.member for each in candidates]):
            chosen = [by_run[member.run.root] for member in group]
            if len(chosen) > 1:
                statuses |= _submit_group(folder, chosen, at_once)
            elif at_once is not None:
                print(f"point {chosen[0].place.point.name}: its jobs are like no other's; --at-once does not count it")
    return statuses


def _candidate(
    place: Place, shared: RunDir, forced: Sequence[str], one: SubmitOne, locks: contextlib.ExitStack
) -> _Candidate | int | None:
    """The point with its plan, and locked; None where it has no jobs to submit, an exit status where it failed here."""
    from pipeline.submit import plan

    run, selected = place.run, place.selected
    taken = share.take(shared, run, place.config)
    if submissions.busy(run) is not None:
        return None
    here = [each.stage for each in divide(place.config, plan(run, place.config, selected, forced))[0]]
    if here:  # stages of the login node; what they make may change what else there is to do
        print(f"\npoint {place.point.name}", flush=True)
        status = one(place.folder, place.config, here, [stage for stage in forced if stage in here], False)
        if status != 0:
            return status
        selected, forced = (tuple(stage for stage in stages if stage not in here) for stages in (selected, forced))
    locks.enter_context(lock(run.root / "control" / "submit.lock", "submitting"))
    submissions.recover(run)
    if submissions.busy(run) is not None:
        return None
    planned = plan(run, place.config, selected, forced)
    if all(each.action == "skip" for each in planned):
        return None
    return _Candidate(place, Member(run, place.config, tuple(planned), tuple(forced)), tuple(taken))


def _submit_group(folder: Path, chosen: Sequence[_Candidate], at_once: int | None) -> dict[str, int]:
    from pipeline.submit import say_plan

    names, members = [each.place.point.name for each in chosen], [each.member for each in chosen]
    try:
        submitted = arrays.submit(Path(os.path.abspath(folder)), members, at_once)
    except UserError as fault:
        if arrays.refused(fault) and at_once is None:
            print(
                f"{fault}; each point is a chain of its own (cluster.job_arrays: false asks for that)", file=sys.stderr
            )
            return {}
        print(f"error: {fault} (points {', '.join(names)})", file=sys.stderr)
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
