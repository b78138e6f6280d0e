"""Slurm's queue: where a job waits or runs, why, and what to do where it would wait for ever.

Fields are asked for by letter and split at bars, since squeue's JSON differs between versions; a word that is not
known here is shown as Slurm says it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import procs
from pipeline.errors import UserError
from pipeline.scheduler import slurm

FIELDS = "%i|%T|%r|%N|%S|%M|%L"


@dataclass(frozen=True)
class Queued:
    """A job in the queue, in squeue's words."""

    job_id: str
    state: str = ""
    """PENDING, RUNNING, ...; empty when Slurm does not answer."""
    reason: str = ""
    nodes: str = ""
    start: float | None = None
    """When it started, or is expected to."""
    used_s: float | None = None
    left_s: float | None = None

    @property
    def waits(self) -> bool:
        """Whether it waits to be started."""
        return self.state == "PENDING" or self.state in _HELD

    @property
    def stuck(self) -> bool:
        """Whether it waits for something that will not come by itself."""
        return self.waits and _why(self)[1] != ""


def ask(job_ids: Sequence[str]) -> dict[str, Queued]:
    """Those of the jobs that Slurm holds in its queue (pending, running, requeued, completing), by id.

    When Slurm does not answer, nothing is known: all of them count as living, so that no state is made up, nothing is
    submitted a second time, and a cancellation still reaches them.
    """
    if not job_ids:
        return {}
    try:
        status, text = procs.capture(
            ["squeue", "--noheader", "--array", f"--format={FIELDS}", f"--jobs={','.join(job_ids)}"]
        )
    except procs.NoAnswer:
        status, text = 1, ""
    if status == 0:
        found = (parse(line) for line in text.splitlines())
        return {job.job_id: job for job in found if job.job_id in job_ids}
    if "Invalid job id" in text:  # it has forgotten every one of them: they are over
        return {}
    return {job_id: Queued(job_id) for job_id in job_ids}


def runs(job_id: str, restart: int) -> bool:
    """Whether a job runs in the start that `restart` counts: not once that is over, nor while it waits again."""
    if job_id not in ask([job_id]):
        return False
    try:
        fields = slurm.show(job_id)
    except procs.NoAnswer:
        return True  # as above: nothing is known
    return fields.get("JobState") != "PENDING" and int(fields.get("Restarts", restart)) == restart


def parse(line: str) -> Queued:
    """A line of squeue's; what is missing or malformed in it is not known."""
    job_id, state, reason, nodes, start, used, left = (*(word.strip() for word in line.split("|")), *[""] * 7)[:7]
    return Queued(job_id, state, reason, nodes, slurm.moment(start), slurm.duration(used), slurm.duration(left))


def own_scripts() -> list[tuple[str, str]]:
    """(id, script) of each of this user's jobs; UserError when Slurm does not answer."""
    status, text = procs.capture(["squeue", "--noheader", "--array", "--format=%i|%o", f"--user={os.getuid()}"])
    if status != 0:
        raise UserError(f"squeue: {' '.join(text.split())}; what the last submission queued is not known, try again")
    return [(job, script) for job, bar, script in (line.partition("|") for line in text.splitlines()) if bar]


def describe(job: Queued, now: float | None = None) -> str:
    """Where the job is, in a few words."""
    name = f"job {job.job_id}"
    if not job.state:
        return f"{name}: Slurm does not answer"
    if job.waits:
        why, remedy = _why(job)
        expected = f", expected {_clock(job.start, now)}" if job.start and not remedy else ""
        return f"{name} {why}{expected}" + (f"; {remedy}" if remedy else "")
    place = f" on {job.nodes}" if job.nodes else ""
    left = f", {_minutes(job.left_s)} left" if job.left_s is not None and job.state == "RUNNING" else ""
    what = "" if job.state == "RUNNING" else f", {_STATES.get(job.state, job.state.lower())}"
    return f"{name}{place}{what}{left}"


_STATES = {
    "COMPLETING": "ending",
    "CONFIGURING": "its nodes get ready",
    "STAGE_OUT": "its data is moved",
    "SIGNALING": "being signalled",
    "SUSPENDED": "suspended by Slurm",
    "STOPPED": "stopped by a signal: scontrol resume it",
    "REQUEUED": "being queued again",
    "RESIZING": "changing its size",
    "REVOKED": "taken over by another cluster of the federation",
}
"""Slurm's states of jobs that neither wait nor just run, in our words."""
_RELEASE = "let it go on with: scontrol release {id}"
_HELD = {
    "REQUEUE_HOLD": ("is queued again, but held", _RELEASE),
    "REQUEUED_HOLD": ("is queued again, but held", _RELEASE),
    "SPECIAL_EXIT": ("is held: it ended in a special way", _RELEASE),
    "RESV_DEL_HOLD": ("is held: its reservation is gone", "correct cluster.reservation, cancel and submit again"),
}
"""States of jobs that are held."""
_AGAIN = "cancel and submit again"
_REASONS: tuple[tuple[str, str, str], ...] = (
    ("Priority", "waits behind others", ""),
    ("Resources", "waits for free nodes", ""),
    ("Dependency", "waits for the jobs before it", ""),
    ("JobArrayTaskLimit", "waits until fewer points of its sweep run", ""),
    ("BeginTime", "waits for its begin time", ""),
    ("JobHeldUser|job requeued in held state", "is held", _RELEASE),
    ("launch failed requeued held", "is held: it could not be started on its node", _RELEASE),
    ("JobHeldAdmin", "is held by an administrator", "ask them why"),
    ("DependencyNeverSatisfied", "waits for a job that failed", _AGAIN),
    ("BadConstraints", "asks for nodes that do not exist", f"correct the profile's constraint, {_AGAIN}"),
    ("PartitionTimeLimit|.*MaxWall.*", "asks for more time than it can get", f"lower its time_min, {_AGAIN}"),
    ("PartitionNodeLimit", "asks for more nodes than the partition gives", f"lower its nodes, {_AGAIN}"),
    ("PartitionInactive", "is in a partition that is inactive", f"take another cluster.partition, {_AGAIN}"),
    ("InvalidAccount|InvalidQOS|AccountNotAllowed|QOSNotAllowed", "may not run", f"correct account and qos, {_AGAIN}"),
    ("ReservationDeleted", "waits for a reservation that is gone", f"correct cluster.reservation, {_AGAIN}"),
    (
        ".*(PerJob|PerJobLimit|MinGRES|MinCpu.*|MinMemory)",
        "asks for more or less than is allowed",
        f"see sacctmgr, {_AGAIN}",
    ),
    ("(Assoc|QOS).*", "waits for a limit of its account or QoS", ""),
    ("ReqNodeNotAvail.*|Nodes required for job are.*", "waits for nodes that are down or reserved", ""),
)
"""(Slurm's reason as a pattern, why the job waits, what to do where that never ends)."""


def _why(job: Queued) -> tuple[str, str]:
    """(why a job waits, what to do about it; empty where that ends by itself)."""
    why, remedy = _HELD.get(job.state) or next(
        ((why, remedy) for pattern, why, remedy in _REASONS if re.fullmatch(pattern, job.reason)), ("waits", "")
    )
    said = f" ({job.reason})" if job.reason not in ("", "None") else ""
    return f"{why}{said}", remedy.format(id=job.job_id)


def _clock(moment: float, now: float | None) -> str:
    """Today's time, or day and time."""
    there, today = time.localtime(moment), time.localtime(now)
    return time.strftime("%H:%M" if there[:3] == today[:3] else "%b %d %H:%M", there)


def _minutes(seconds: float | None) -> str:
    minutes = int((seconds or 0) // 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
