"""What Slurm says of itself: version, partitions with their limits, kinds of nodes, configuration, associations."""

from __future__ import annotations

import getpass
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.site.ask import Answer, ask, together

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
_NODE_FORMAT = "%R|%D|%c|%m|%G|%T|%f"
_UNUSABLE = ("down", "drain", "fail", "maint", "unknown", "future", "powered_down", "inval")
"""How the states begin in which a node takes no job soon; "idle", "mixed" and "allocated" are fine."""


@dataclass(frozen=True)
class Partition:
    """A partition's limits; None where it sets none."""

    name: str
    default: bool = False
    up: bool = True
    max_time_min: int | None = None
    max_nodes: int | None = None
    max_cpus: int | None = None
    max_mem_mb: int | None = None
    grace_s: int = 0
    preempt_mode: str = "OFF"
    accounts: tuple[str, ...] = ()
    """Accounts that alone may use it; empty: all."""
    qos: tuple[str, ...] = ()
    """QoS that alone may use it; empty: all."""


@dataclass(frozen=True)
class NodeKind:
    """Nodes of one partition that are alike."""

    partition: str
    count: int
    cpus: int
    mem_mb: int
    gpus: Mapping[str, int] = field(default_factory=dict)
    """GPUs by type; the type is "" where the site names none."""
    features: tuple[str, ...] = ()
    usable: bool = True

    def gpu_count(self, gpu_type: str | None) -> int:
        """GPUs of the type, or of all types."""
        return self.gpus.get(gpu_type, 0) if gpu_type else sum(self.gpus.values())


@dataclass(frozen=True)
class Association:
    """An account that this user may charge, and the QoS that go with it."""

    account: str
    qos: tuple[str, ...] = ()
    default: bool = False


@dataclass(frozen=True)
class SlurmFacts:
    """All that was asked of Slurm."""

    missing: tuple[str, ...] = ()
    """Commands that are not on PATH."""
    version: tuple[int, ...] = ()
    ping: str = ""
    answers: bool = False
    """Whether the controller answers."""
    partitions: tuple[Partition, ...] = ()
    nodes: tuple[NodeKind, ...] = ()
    config: Mapping[str, str] = field(default_factory=dict)
    accounting: bool = False
    """Whether sacct works."""
    associations: tuple[Association, ...] = ()
    reservations: tuple[str, ...] = ()

    @property
    def present(self) -> bool:
        return "sbatch" not in self.missing

    def partition(self, name: str | None) -> Partition | None:
        """The partition of that name, the first of several, or the default one; None when it does not exist."""
        first = name.split(",")[0] if name else None
        return next((each for each in self.partitions if (each.default if first is None else each.name == first)), None)

    def kinds(self, partition: Partition) -> list[NodeKind]:
        """The kinds of nodes in the partition."""
        return [each for each in self.nodes if each.partition == partition.name]


def probe() -> SlurmFacts:
    """Ask Slurm; a machine without its commands is asked nothing."""
    missing = tuple(name for name in COMMANDS if shutil.which(name) is None)
    if "sbatch" in missing:
        return SlurmFacts(missing)
    user = getpass.getuser()
    fields = "format=account,qos,defaultaccount"
    answers = together(
        {
            "version": lambda: ask(["sbatch", "--version"]),
            "ping": lambda: ask(["scontrol", "ping"]),
            "partitions": lambda: ask(["scontrol", "--oneliner", "show", "partition"]),
            "nodes": lambda: ask(["sinfo", "--noheader", "--exact", f"--format={_NODE_FORMAT}"]),
            "config": lambda: ask(["scontrol", "show", "config"]),
            "sacct": lambda: ask(["sacct", "-X", "-n", "--starttime=now"]),
            "user": lambda: ask(["sacctmgr", "-n", "-P", "show", "user", user, "withassoc", fields]),
            "reservations": lambda: ask(["scontrol", "--oneliner", "show", "reservation"]),
        }
    )
    return read({name: answer or Answer(None, "no answer") for name, answer in answers.items()}, missing)


def read(answers: Mapping[str, Answer], missing: tuple[str, ...] = ()) -> SlurmFacts:
    """The facts in what the commands said. What was not answered is empty."""

    def text(name: str) -> str:
        return answers[name].text if answers[name].ok else ""

    return SlurmFacts(
        missing,
        tuple(int(part) for part in re.findall(r"\d+", text("version"))[:3]),
        answers["ping"].line,
        answers["ping"].ok and " UP" in answers["ping"].text,
        tuple(_partition(line) for line in text("partitions").splitlines() if line.startswith("PartitionName=")),
        tuple(_node_kind(line) for line in text("nodes").splitlines() if line.count("|") == 6),
        _config(text("config")),
        answers["sacct"].ok,
        tuple(_association(line) for line in text("user").splitlines() if line.count("|") == 2),
        tuple(re.findall(r"ReservationName=(\S+)", text("reservations"))),
    )


def minutes(text: str) -> int | None:
    """Slurm's time limit ("1-00:00:00", "30:00", "UNLIMITED") in whole minutes; None where there is no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return None
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:  # days-hours[:minutes[:seconds]]
        hours, mins = (*numbers, 0)[:2]
        return (int(days) * 24 + hours) * 60 + mins
    if len(numbers) == 3:
        return numbers[0] * 60 + numbers[1]
    return numbers[0]  # minutes[:seconds]


def gpus_of(gres: str) -> dict[str, int]:
    """GPUs by type, of a node's Gres such as "gpu:a100:8(S:0-1),nvme:1"."""
    found: dict[str, int] = {}
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        parts = entry.split(":")
        if parts[0] == "gpu":
            kind = parts[1] if len(parts) > 2 else ""
            count = int(parts[-1]) if parts[-1].isdigit() else 1
            found[kind] = found.get(kind, 0) + count
    return found


def _partition(line: str) -> Partition:
    fields = dict(word.partition("=")[::2] for word in line.split())

    def number(name: str) -> int | None:
        return int(fields[name]) if fields.get(name, "").isdigit() and fields[name] != "0" else None

    def names(name: str) -> tuple[str, ...]:
        value = fields.get(name, "ALL")
        return () if value in ("ALL", "(null)", "N/A") else tuple(value.split(","))

    return Partition(
        fields["PartitionName"],
        fields.get("Default") == "YES",
        fields.get("State", "UP") == "UP",
        minutes(fields.get("MaxTime", "UNLIMITED")),
        number("MaxNodes"),
        number("MaxCPUsPerNode"),
        number("MaxMemPerNode"),
        number("GraceTime") or 0,
        fields.get("PreemptMode", "OFF"),
        names("AllowAccounts"),
        names("AllowQos"),
    )


def _node_kind(line: str) -> NodeKind:
    partition, count, cpus, memory, gres, state, features = line.split("|")
    return NodeKind(
        partition,
        int(count),
        int(cpus.rstrip("+")),
        int(memory.rstrip("+")),
        gpus_of(gres),
        () if features == "(null)" else tuple(features.split(",")),
        not state.startswith(_UNUSABLE),
    )


def _config(text: str) -> dict[str, str]:
    pairs = (re.split(r"\s+=\s*", line.strip(), maxsplit=1) for line in text.splitlines())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def _association(line: str) -> Association:
    account, qos, default = line.split("|")
    return Association(account, tuple(filter(None, qos.split(","))), account == default)
