"""Whether a job that failed is tried again, and with what: pure functions of what is known, and the record of retries.

A job tries again under its own id, so that what waits for it keeps waiting (pipeline/stages/retry.py).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.config.cluster import Cluster
from pipeline.run import atomic
from pipeline.scheduler import slurm
from pipeline.stages.faults import Fault

_MEGABYTES = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}
_UNBOUNDED = 10**9


@dataclass(frozen=True)
class Asked:
    """What a job asked Slurm for. 0: it was not asked for, or there is no limit."""

    mem_gb: int = 0
    """On each node."""
    time_min: int = 0
    excluded: frozenset[str] = frozenset()
    nodes: int = 1


@dataclass(frozen=True)
class Room:
    """What the job's partition could give; 0 where that is not known."""

    mem_gb: int = 0
    """Of the node that has the most."""
    time_min: int = 0
    nodes: frozenset[str] = frozenset()
    """Those that are up."""


@dataclass(frozen=True)
class Retry:
    """The next try. What is 0 or empty stays as it was."""

    number: int
    of: int
    reason: str
    mem_gb: int = 0
    time_min: int = 0
    without: str = ""
    """A node to avoid from now on."""
    no_other: bool = False
    """The node was at fault, but no other is left."""

    def __str__(self) -> str:
        how = ""
        if self.mem_gb:
            how = f" with {self.mem_gb} GB"
        elif self.time_min:
            how = f" with {self.time_min} min"
        elif self.without:
            how = f" without {self.without}"
        elif self.no_other:
            how = ", on any node"
        return f"retry {self.number} of {self.of}{how}: {self.reason}"


def decide(cluster: Cluster, fault: Fault, asked: Asked, room: Room, retried: int) -> Retry | str:
    """The next try, or why there is none."""
    if retried >= cluster.retries:
        return f"{retried} of {cluster.retries} retries are used (cluster.retries)"
    number, of = retried + 1, cluster.retries
    if fault.kind == "memory":
        mem_gb, end = grown(cluster, asked.mem_gb, cluster.max_mem_gb, room.mem_gb, "cluster.max_mem_gb")
        return Retry(number, of, fault.reason, mem_gb=mem_gb) if mem_gb else f"{asked.mem_gb} GB: {end}"
    if fault.kind == "time":
        minutes, end = grown(cluster, asked.time_min, cluster.max_time_min, room.time_min, "cluster.max_time_min")
        return Retry(number, of, fault.reason, time_min=minutes) if minutes else f"{asked.time_min} min: {end}"
    if fault.node and len(room.nodes - asked.excluded - {fault.node}) >= asked.nodes:
        return Retry(number, of, fault.reason, without=fault.node)
    return Retry(number, of, fault.reason, no_other=bool(fault.node))


def grown(cluster: Cluster, now: int, most: int | None, room: int, key: str) -> tuple[int, str]:
    """(the next larger amount, "") within the profile's and the partition's limits, or (0, why it cannot grow)."""
    if now <= 0:
        return 0, "the job does not ask for an amount that could grow"
    limit = min(most or _UNBOUNDED, room or _UNBOUNDED)
    if now >= limit:
        return 0, f"no more may be asked for ({f'{key}: {most}' if limit == most else 'the largest of its partition'})"
    return min(limit, math.ceil(now * cluster.retry_growth)), ""


def asked(cluster: Cluster, fields: Mapping[str, str], cpus: int, excluded: frozenset[str]) -> Asked:
    """What a job asks for, from the controller's fields of it; `excluded` is its ExcNodeList, node by node."""
    memory = _gigabytes(fields.get("MinMemoryNode", "")) or cpus * _gigabytes(fields.get("MinMemoryCPU", ""))
    if cluster.memory_request == "none":
        memory = 0.0  # what the site gives without being asked
    nodes = re.match(r"\d+", fields.get("NumNodes", "1"))
    return Asked(math.ceil(memory), minutes(fields.get("TimeLimit", "")), excluded, int(nodes[0]) if nodes else 1)


def changes(cluster: Cluster, retry: Retry, cpus: int, excluded: str) -> dict[str, str]:
    """What `scontrol update` is told, by Slurm's names; `excluded` is the job's ExcNodeList so far."""
    told = {}
    if retry.mem_gb and cluster.memory_request == "mem-per-cpu":
        told["MinMemoryCPU"] = str(math.ceil(retry.mem_gb * 1024 / cpus))
    elif retry.mem_gb:
        told["MinMemoryNode"] = str(retry.mem_gb * 1024)
    if retry.time_min:
        told["TimeLimit"] = str(retry.time_min)
    if retry.without:
        told["ExcNodeList"] = ",".join(filter(None, (excluded.replace("(null)", ""), retry.without)))
    return told


def minutes(text: str) -> int:
    """A time limit as Slurm writes it, in minutes, rounded up; 0 for UNLIMITED and what is no time."""
    return math.ceil((slurm.duration(text) or 0.0) / 60)


def _gigabytes(text: str) -> float:
    found = re.fullmatch(r"([\d.]+)([KMGT]?)", text)
    return float(found[1]) * _MEGABYTES[found[2] or "M"] / 1024 if found else 0.0


@dataclass(frozen=True)
class Record:
    """jobs/<submission>-<job>/retries/<job id>-<restart>.json: one retry, claimed by whoever saw the failure first."""

    kind: str
    text: str
    mem_gb: int
    time_min: int
    node: str
    without: str
    time: float


def claim(folder: Path, job_id: str, restart: int, fault: Fault, retry: Retry) -> bool:
    """Record the retry of this start of the job; False when another process of the job has done so."""
    record = Record(fault.kind, str(retry), retry.mem_gb, retry.time_min, fault.node, retry.without, time.time())
    return atomic.create_json(_folder(folder) / f"{job_id}-{restart}.json", asdict(record))


def claimed(folder: Path, job_id: str, restart: int) -> bool:
    """Whether this start of the job is being retried."""
    return (_folder(folder) / f"{job_id}-{restart}.json").exists()


def withdraw(folder: Path, job_id: str, restart: int) -> None:
    """Slurm has refused the retry: this start of the job is over for good."""
    (_folder(folder) / f"{job_id}-{restart}.json").unlink(missing_ok=True)


def records(folder: Path) -> list[Record]:
    """The retries of a submission's job so far, in order."""
    raw = [atomic.read_json(path) for path in _folder(folder).glob("*.json")]
    return sorted((Record(**one) for one in raw if one is not None), key=lambda record: record.time)


def _folder(job_folder: Path) -> Path:
    return job_folder / "retries"
