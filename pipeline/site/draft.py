"""A first cluster profile, drafted from what was seen: commented YAML for a person to read and correct. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from pipeline.site.engine import EngineFacts, works
from pipeline.site.slurm import NodeKind, Partition, SlurmFacts

_TRAIN_MIN = 48 * 60
_OTHER_MIN = 120
_SCRATCH = ("SLURM_TMPDIR", "TMPDIR")
"""Variables that sites set in jobs to a folder on the node's own disk."""
_SHARED = ("SCRATCH", "WORK", "PROJECT")
"""Variables with which sites name a folder that all nodes see."""
_FABRIC = re.compile(r"(ib|hsn|opa|roce)\w*\d")


@dataclass(frozen=True)
class Seen:
    """What a draft is made from."""

    slurm: SlurmFacts
    engine: EngineFacts
    interfaces: Sequence[str] = ()
    environ: Mapping[str, str] | None = None


@dataclass(frozen=True)
class _Share:
    """What a stage asks for on each node."""

    time_min: int
    cpus: int
    mem_gb: int
    gpus: int = 0

    def __str__(self) -> str:
        gpus = f", gpus: {self.gpus}" if self.gpus else ""
        return f"{{time_min: {self.time_min}, cpus: {self.cpus}, mem_gb: {self.mem_gb}{gpus}}}"


def draft(seen: Seen) -> str:
    """The profile's text."""
    lines = [
        "# Drafted by python -m pipeline.doctor --write-profile from what it saw. Read it, correct it, then:",
        "#   python -m pipeline.doctor --cluster THIS_FILE",
    ]
    best = largest(seen.slurm)
    if best is None:
        lines += ["# No Slurm answered: jobs are processes of this machine.", "name: this-machine", "executor: local"]
        return "\n".join([*lines, *_engine(seen.engine)]) + "\n"
    partition, kind = best
    lines += _place(seen, partition, kind)
    lines += _requests(seen.slurm, kind)
    lines += _interruption(seen.slurm, partition)
    lines += _engine(seen.engine)
    lines += _nodes(seen)
    lines += _stages(seen.slurm, partition, kind)
    return "\n".join(lines) + "\n"


def largest(facts: SlurmFacts) -> tuple[Partition, NodeKind] | None:
    """The partition, and its kind of nodes, with the most GPUs a node; then default, longest, largest ones first."""
    pairs = [
        (partition, kind)
        for partition in facts.partitions
        if partition.up
        for kind in facts.kinds(partition)
        if kind.usable
    ]

    def rank(pair: tuple[Partition, NodeKind]) -> tuple[float, ...]:
        partition, kind = pair
        longest = float("inf") if partition.max_time_min is None else partition.max_time_min
        return (kind.gpu_count(None), not partition.accounts, partition.default, longest, kind.count, kind.mem_mb)

    return max(pairs, key=rank, default=None)


def _place(seen: Seen, partition: Partition, kind: NodeKind) -> list[str]:
    name = seen.slurm.config.get("ClusterName", "") or "my-cluster"
    others = sorted({each.name for each in seen.slurm.partitions} - {partition.name})
    lines = [
        f"name: {_text(name)}",
        "executor: slurm",
        f"# {kind.count} nodes with {_gpus(kind)}, {kind.cpus} CPUs and {kind.mem_mb // 1024} GiB each.",
    ]
    if others:
        lines.append(f"# Other partitions: {', '.join(others)}.")
    lines.append(f"partition: {_text(partition.name)}")
    accounts = [each.account for each in seen.slurm.associations]
    allowed = [name for name in accounts if not partition.accounts or name in partition.accounts]
    default = next((each.account for each in seen.slurm.associations if each.default and each.account in allowed), None)
    if allowed:
        lines += [f"# Your accounts: {', '.join(allowed)}.", f"account: {_text(default or allowed[0])}"]
    else:
        lines.append("# account: the one that is charged, where the site wants one")
    if kind.features:
        lines.append(f"# constraint: features of these nodes are {', '.join(kind.features)}")
    return lines


def _requests(facts: SlurmFacts, kind: NodeKind) -> list[str]:
    lines = []
    tres = facts.config.get("SelectType", "select/cons_tres") == "select/cons_tres"
    style = "gpus-per-node" if tres else "gres"
    if kind.gpu_count(None):
        lines.append(f"gpu_request: {style}")
        types = [name for name in kind.gpus if name]
        if len(types) == 1:
            lines.append(f"gpu_type: {_text(types[0])}")
        elif types:
            lines.append(f"# gpu_type: these nodes have {' and '.join(types)}")
    if kind.mem_mb <= 1:
        lines += ["# Slurm does not know the nodes' memory, so it cannot be asked for.", "memory_request: none"]
    return lines


def _interruption(facts: SlurmFacts, partition: Partition) -> list[str]:
    preempts = facts.config.get("PreemptType", "preempt/none") != "preempt/none" and partition.preempt_mode != "OFF"
    grace = min(120, max(10, partition.grace_s)) if preempts and partition.grace_s else 120
    if preempts and partition.preempt_mode != "REQUEUE":
        note = f"# A preempted job is not queued again here (PreemptMode={partition.preempt_mode}): submit again then."
    elif preempts:
        note = f"# Jobs may be preempted; they then have {partition.grace_s} s (GraceTime)."
    else:
        note = "# Jobs are not preempted. Before its time limit a training saves and is queued again."
    return [note, "requeue: true", f"grace_s: {grace}"]


def _engine(facts: EngineFacts) -> list[str]:
    found = [name for name in ("apptainer", "singularity", "docker") if name in facts.versions and works(name, facts)]
    if found:
        return [f"# {facts.versions[found[0]].line}.", f"engine: {found[0]}"]
    note = "# No container engine works here; load its module (modules: [...]) if the site has one."
    return [note, "engine: venv"] if facts.venv_fault is None else [note, f"# engine: venv: {facts.venv_fault}"]


def _nodes(seen: Seen) -> list[str]:
    environ = seen.environ or {}
    lines = []
    fabric = [name for name in seen.interfaces if _FABRIC.fullmatch(name)]
    if fabric:
        lines += [f"# Interfaces here: {', '.join(seen.interfaces)}.", f"interface: {_text(fabric[0])}"]
    else:
        lines.append("# interface: the nodes' fast network, as in ib0 (srun ip -brief address)")
    inside = [name for name in _SCRATCH if environ.get(name) and "SLURM_JOB_ID" in environ]
    if inside:
        lines.append(f"scratch: ${inside[0]}")
    else:
        lines.append("# scratch: a folder on the node's own disk, as in $SLURM_TMPDIR")
    shared = next((name for name in _SHARED if environ.get(name, "").startswith("/")), None)
    if shared:
        lines += [f"# From ${shared}.", f"cache: {_text(environ[shared].rstrip('/') + '/hh-pipeline')}"]
    else:
        lines.append("# cache: a folder that all nodes see, for models, data and images (tens of GiB)")
    proxy = next((environ[name] for name in ("https_proxy", "HTTPS_PROXY") if environ.get(name)), None)
    if proxy and "@" not in proxy:  # with a password it does not belong into a file
        lines.append(f"proxy: {_text(proxy)}")
    return lines


def _stages(facts: SlurmFacts, partition: Partition, kind: NodeKind) -> list[str]:
    gpus = kind.gpu_count(None)
    limit = partition.max_time_min or _TRAIN_MIN
    cpus = min(kind.cpus, partition.max_cpus or kind.cpus)
    memory = min(kind.mem_mb, partition.max_mem_mb or kind.mem_mb)
    whole_gb = max(1, memory * 9 // 10 // 1024)  # the system needs some
    parts = max(1, gpus)
    other = _Share(min(limit, _OTHER_MIN), max(1, cpus // parts), max(1, whole_gb // parts))
    one = _Share(other.time_min, other.cpus, other.mem_gb, min(1, gpus))
    train = _Share(min(limit, _TRAIN_MIN), cpus, whole_gb, gpus)
    serve = _Share(train.time_min, other.cpus, other.mem_gb, one.gpus)  # as long as its training
    longest = f"{partition.max_time_min} min" if partition.max_time_min else "no limit"
    return [
        f"# The partition's longest job: {longest}. A training that needs more goes on in further segments.",
        "# prefetch needs the internet, and fetches for sandbox too: on the login node where nodes have none.",
        f"default: {other}",
        "stages:",
        *(f"  {stage}: {one}" for stage in ("sft", "reward-model", "convert", "evaluate")),
        f"  serve: {serve}",
        "  # With the server in the same job (placement: colocated), the last GPU serves and the others train.",
        f"  train: {train}",
    ]


def _gpus(kind: NodeKind) -> str:
    named = [f"{count} {name or 'GPUs'}" for name, count in kind.gpus.items()]
    return " and ".join(named) or "no GPUs"


def _text(value: str) -> str:
    """A string as YAML writes it."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("\n...")
