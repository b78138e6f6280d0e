"""Slurm itself, as this machine sees it: commands, controller, partitions, accounting. Pure functions of its facts."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.cluster import Cluster
from pipeline.site.findings import Finding, Level
from pipeline.site.slurm import COMMANDS, Partition, SlurmFacts

TOPIC = "Slurm"
_SHOWN = 12
"""Partitions that are listed."""


def judge(facts: SlurmFacts, cluster: Cluster) -> list[Finding]:
    """What of Slurm is there, and what of it is needed and is not."""
    wanted = cluster.executor == "slurm"
    if not facts.present:
        if not wanted:
            return [_finding("ok", f"none here, and profile {cluster.name} needs none: jobs are processes")]
        what = f"cluster.executor: slurm (profile {cluster.name}), but there is no sbatch on PATH"
        return [_finding("fail", what, "go to a login node, load the site's Slurm module, or use --cluster local")]
    if not wanted:
        state = (
            f"{_version(facts)} is here" if facts.answers else "Slurm's commands are here, and no controller answers"
        )
        return [
            _finding("ok", f"{state}; profile {cluster.name} does without: jobs are processes of this machine"),
            *([_hint(facts)] if facts.answers else []),
        ]
    findings = []
    absent = [name for name in facts.missing if name in COMMANDS]
    if absent:
        what = f"not on PATH: {', '.join(absent)}"
        findings.append(_finding("fail", what, "install Slurm's client commands, or load the site's module"))
    if facts.answers:
        cluster_name = facts.config.get("ClusterName", "")
        findings.append(
            _finding("ok", f"{_version(facts)}, cluster {cluster_name or '(no name)'}; the controller answers")
        )
    else:
        what = f"the controller does not answer: {facts.ping or 'scontrol ping said nothing'}"
        return [*findings, _finding("fail", what, "is this the login node? is SLURM_CONF right? ask the site")]
    findings += [*_age(facts), *_partitions(facts, cluster), _accounting(facts), *_devices(facts)]
    return findings


def _finding(level: Level, what: str, remedy: str = "") -> Finding:
    return Finding(TOPIC, level, what, remedy)


def _version(facts: SlurmFacts) -> str:
    major, minor, *rest = (*facts.version, 0, 0)
    return f"Slurm {major}.{minor:02d}.{rest[0]}" if facts.version else "Slurm of an unknown version"


def _hint(facts: SlurmFacts) -> Finding:
    largest = max((kind.gpu_count(None) for kind in facts.nodes), default=0)
    what = f"its nodes have up to {largest} GPUs; --write-profile FILE drafts a profile for them"
    return _finding("ok", what)


def _age(facts: SlurmFacts) -> list[Finding]:
    if not facts.version or facts.version >= (22, 5):
        return []
    what = f"{_version(facts)} is older than what jobs were tried on (22.05)"
    return [_finding("warn", what, "try --stage prefetch --preset demo with this profile first")]


def _partitions(facts: SlurmFacts, cluster: Cluster) -> list[Finding]:
    chosen = facts.partition(cluster.partition)
    ordered = sorted(facts.partitions, key=lambda each: each != chosen)
    shown = [_finding("ok", _describe(facts, each, each == chosen)) for each in ordered[:_SHOWN]]
    if len(ordered) > _SHOWN:
        shown.append(_finding("ok", f"and {len(ordered) - _SHOWN} more partitions: see sinfo"))
    return shown or [_finding("unknown", "no partition is visible to you", "ask the site for access")]


def _describe(facts: SlurmFacts, partition: Partition, chosen: bool) -> str:
    kinds = facts.kinds(partition)
    nodes = sum(kind.count for kind in kinds)
    ready = sum(kind.count for kind in kinds if kind.usable)
    gpus = sorted({f"{count} {name or 'GPUs'}" for kind in kinds for name, count in kind.gpus.items()})
    parts = [
        f"{nodes} nodes" + (f" ({ready} up)" if ready < nodes else ""),
        f"GPUs a node: {' or '.join(gpus)}" if gpus else "no GPUs",
        f"{_span([kind.cpus for kind in kinds])} CPUs",
        f"{_span([kind.mem_mb // 1024 for kind in kinds])} GiB",
        f"at most {duration(partition.max_time_min)}" if partition.max_time_min else "no time limit",
    ]
    mark = " (this profile's)" if chosen else ""
    return f"partition {partition.name}{mark}: {', '.join(parts)}"


def _span(numbers: Sequence[int]) -> str:
    low, high = (min(numbers), max(numbers)) if numbers else (0, 0)
    return str(low) if low == high else f"{low}-{high}"


def duration(mins: int) -> str:
    """Minutes as people say them."""
    hours, rest = divmod(mins, 60)
    return f"{mins} min" if rest or not hours else f"{hours} h"


def _accounting(facts: SlurmFacts) -> Finding:
    if facts.accounting:
        return _finding("ok", "accounting works (sacct): the reasons of old jobs are known too")
    return _finding("ok", "no accounting (sacct); the pipeline does not need it")


def _devices(facts: SlurmFacts) -> list[Finding]:
    if not facts.config:
        return []
    if "gpu" not in facts.config.get("GresTypes", ""):
        what = "Slurm knows no GPUs here (GresTypes): jobs that ask for them are refused"
        return [_finding("warn", what, "ask for gpus: 0 in each stage, or ask the site how GPUs are requested")]
    fenced = facts.config.get("ConstrainDevices")
    if fenced == "no" or (fenced is None and "cgroup" not in facts.config.get("TaskPlugin", "")):
        what = "GPUs are not fenced off by cgroups: only CUDA_VISIBLE_DEVICES keeps jobs of one node apart"
        return [_finding("warn", what, "leave CUDA_VISIBLE_DEVICES alone in cluster.setup and cluster.environment")]
    return [_finding("ok", "cgroups fence off each job's GPUs" if fenced else "tasks run in cgroups")]
