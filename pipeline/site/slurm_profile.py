"""The cluster profile against what Slurm says: each fault under the profile's key that mends it. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from pipeline.config.cluster import Cluster, Resources
from pipeline.errors import nearest
from pipeline.site.findings import Finding, Level
from pipeline.site.slurm import NodeKind, Partition, SlurmFacts

TOPIC = "Cluster profile"


def judge(facts: SlurmFacts, cluster: Cluster, stages: Sequence[str]) -> list[Finding]:
    """What of the profile Slurm cannot give."""
    if not facts.partitions:
        return []
    names: list[str | None] = list(cluster.partition.split(",")) if cluster.partition else [None]
    found = []
    for name in names:
        partition = facts.partition(name)
        if partition is None:
            return [_no_partition(facts, name)]
        found.append(_judge_one(facts, cluster, stages, partition))
    # Of several partitions Slurm takes the one that can start the job first: one that fits is enough.
    return min(found, key=lambda findings: sum(each.level == "fail" for each in findings))


def _judge_one(facts: SlurmFacts, cluster: Cluster, stages: Sequence[str], partition: Partition) -> list[Finding]:
    findings = [] if partition.up else [_finding("fail", f"partition {partition.name} is not up", "choose another one")]
    findings += _place(facts, cluster, partition)
    findings += _requests(facts, cluster)
    for key, resources in _keys(cluster, stages):
        findings += _resources(key, resources, cluster, partition, facts.kinds(partition))
        findings += _time(key, resources, cluster, partition)
    return findings or [
        _finding("ok", f"partition {partition.name} has the nodes, and the time, that each stage's job asks for")
    ]


def judge_preemption(facts: SlurmFacts, cluster: Cluster) -> list[Finding]:
    """What becomes of a job that Slurm interrupts."""
    partition = facts.partition(cluster.partition)
    if not facts.config or partition is None:
        return []
    mode = partition.preempt_mode
    seconds = f"cluster.grace_s ({cluster.grace_s} s)"
    if facts.config.get("PreemptType", "preempt/none") == "preempt/none" or mode == "OFF":
        findings = [_finding("ok", f"jobs of partition {partition.name} are not preempted")]
    elif mode != "REQUEUE":
        what = f"jobs of partition {partition.name} that are preempted are not queued again (PreemptMode={mode})"
        findings = [_finding("warn", what, "after a preemption, submit again: the run goes on where it was")]
    elif not _sends_signal(facts):
        what = "Slurm preempts with TERM alone: the training has KillWait to save in, not " + seconds
        kill_wait = facts.config.get("KillWait", "30 sec")
        findings = [
            _finding(
                "warn", f"{what} (KillWait = {kill_wait})", "lower train.checkpoint_interval, so that less is lost"
            )
        ]
    elif partition.grace_s < cluster.grace_s:
        what = (
            f"partition {partition.name} leaves a preempted job {partition.grace_s} s (GraceTime), less than {seconds}"
        )
        findings = [_finding("warn", what, "lower train.checkpoint_interval, so that less is lost")]
    else:
        findings = [_finding("ok", f"a preempted training has {partition.grace_s} s to save in, and is queued again")]
    if cluster.requeue and facts.config.get("JobRequeue") == "0":
        findings.append(
            _finding("ok", "the site's default is not to requeue (JobRequeue=0); the jobs ask for it themselves")
        )
    if cluster.requeue and (match := re.search(r"cred_expire=(\d+)", facts.config.get("AuthInfo", ""))):
        findings.append(_finding("ok", f"a job that is queued again starts after {match[1]} s at the earliest"))
    return findings


def _finding(level: Level, what: str, remedy: str = "") -> Finding:
    return Finding(TOPIC, level, what, remedy)


def _no_partition(facts: SlurmFacts, name: str | None) -> Finding:
    names = [each.name for each in facts.partitions]
    if name is None:
        what = "cluster.partition: none is named, and Slurm has no default partition"
        return _finding("fail", what, f"name one of {', '.join(names)}")
    what = f"cluster.partition: Slurm has no partition {name}{nearest(name, names)}"
    return _finding("fail", what, f"take one of {', '.join(names)}")


def _place(facts: SlurmFacts, cluster: Cluster, partition: Partition) -> Iterator[Finding]:
    """Account, QoS, reservation and constraint."""
    if cluster.reservation and cluster.reservation not in facts.reservations:
        known = ", ".join(facts.reservations) or "none at all"
        what = f"cluster.reservation: Slurm has no reservation {cluster.reservation}"
        yield _finding("fail", what, f"reservations now: {known}")
    accounts = {each.account for each in facts.associations}
    for key, value, allowed in (
        ("account", cluster.account, partition.accounts),
        ("qos", cluster.qos, partition.qos),
    ):
        if value and allowed and value not in allowed:
            what = f"cluster.{key}: partition {partition.name} does not admit {value}"
            yield _finding("fail", what, f"it admits {', '.join(allowed)}")
    if cluster.account and accounts and cluster.account not in accounts:
        what = f"cluster.account: you have no account {cluster.account}{nearest(cluster.account, accounts)}"
        yield _finding("fail", what, f"your accounts: {', '.join(sorted(accounts))}")
    qos = {name for each in facts.associations for name in each.qos if cluster.account in (None, each.account)}
    if cluster.qos and qos and cluster.qos not in qos:
        what = f"cluster.qos: you have no QoS {cluster.qos}{nearest(cluster.qos, qos)}"
        yield _finding("fail", what, f"yours: {', '.join(sorted(qos))}")
    if cluster.constraint:
        features = {feature for kind in facts.kinds(partition) for feature in kind.features}
        has = f"its nodes have {', '.join(sorted(features))}" if features else "its nodes have none: leave it out"
        named = [name for name in re.split(r"\*\d+|[&|,()\[\]!\s]+", cluster.constraint) if name]
        absent = [name for name in named if name not in features]
        if absent and ("|" not in cluster.constraint or absent == named):  # of alternatives, one is enough
            for name in absent:
                what = f"cluster.constraint: no node of partition {partition.name} has the feature {name}"
                yield _finding("fail", what + nearest(name, features), has)


def _requests(facts: SlurmFacts, cluster: Cluster) -> Iterator[Finding]:
    """The way in which GPUs and memory are asked for."""
    select = facts.config.get("SelectType", "")
    if cluster.gpu_request != "gres" and select in ("select/linear", "select/cons_res"):
        what = f"cluster.gpu_request: {cluster.gpu_request} needs select/cons_tres, and Slurm runs {select}"
        yield _finding("fail", what, "set gpu_request: gres")
    if cluster.memory_request != "none" and facts.nodes and all(kind.mem_mb <= 1 for kind in facts.nodes):
        what = f"cluster.memory_request: {cluster.memory_request}, but Slurm does not know its nodes' memory"
        yield _finding("fail", what, "set memory_request: none")


def _keys(cluster: Cluster, stages: Sequence[str]) -> list[tuple[str, Resources]]:
    """The parts of the profile that the stages' jobs ask with, each once."""
    named = [(f"cluster.stages.{stage}", cluster.stages[stage]) for stage in stages if stage in cluster.stages]
    return named if len(named) == len(stages) else [("cluster.default", cluster.default), *named]


def _resources(
    key: str, asked: Resources, cluster: Cluster, partition: Partition, kinds: Sequence[NodeKind]
) -> Iterator[Finding]:
    """Whether enough nodes have what is asked for of one; if not, which wish is too much."""
    if not kinds:
        return
    mem_mb = 0 if cluster.memory_request == "none" else asked.mem_gb * 1024
    types = {name for kind in kinds for name in kind.gpus if name}
    typed = f" of type {cluster.gpu_type}" if cluster.gpu_type in types else ""
    cpus = min(max(kind.cpus for kind in kinds), partition.max_cpus or 10**9)
    memory = min(max(kind.mem_mb for kind in kinds), partition.max_mem_mb or 10**12)
    known = cluster.gpu_type if cluster.gpu_type in types else None
    gpus = max(kind.gpu_count(known) for kind in kinds)
    faults = []
    if asked.gpus and cluster.gpu_type and cluster.gpu_type not in types:
        what = f"cluster.gpu_type: partition {partition.name} has no GPUs of type {cluster.gpu_type}"
        has = f"it has {', '.join(sorted(types))}" if types else "its GPUs have no types: leave it out"
        faults.append(_finding("fail", what + nearest(cluster.gpu_type, types), has))
    if asked.gpus > gpus:
        what = f"{key}.gpus: {asked.gpus}, but no node of partition {partition.name} has more than {gpus}{typed}"
        more = f"ask for at most {gpus}, and for more nodes" if gpus else "take a partition with GPUs"
        faults.append(_finding("fail", what, more))
    if asked.cpus > cpus:
        what = f"{key}.cpus: {asked.cpus}, but a job gets at most {cpus} on a node of partition {partition.name}"
        faults.append(_finding("fail", what, f"ask for at most {cpus}"))
    if mem_mb > max(memory, 1):
        what = f"{key}.mem_gb: {asked.mem_gb}, but a job gets at most {memory // 1024} on a node of {partition.name}"
        faults.append(_finding("fail", what, f"ask for at most {memory // 1024}"))
    limit = partition.max_nodes
    if limit and asked.nodes > limit:
        what = f"{key}.nodes: {asked.nodes}, but a job of partition {partition.name} has at most {limit}"
        faults.append(_finding("fail", what, f"ask for at most {limit}"))
    fitting = [
        kind
        for kind in kinds
        if kind.cpus >= asked.cpus and kind.mem_mb >= mem_mb and kind.gpu_count(cluster.gpu_type) >= asked.gpus
    ]
    count, usable = sum(kind.count for kind in fitting), sum(kind.count for kind in fitting if kind.usable)
    if not faults and count < asked.nodes:
        what = f"{key}: {asked.nodes} such nodes are asked for, and partition {partition.name} has {count}"
        size = f"{asked.gpus} GPUs{typed}, {asked.cpus} CPUs and {asked.mem_gb} GiB at once"
        faults.append(_finding("fail", what, f"ask for fewer nodes, or for less on each: {size}"))
    elif not faults and usable < asked.nodes:
        what = f"{key}: {usable} of the {count} nodes that fit are up; its jobs wait for more"
        faults.append(_finding("warn", what, "see sinfo --list-reasons"))
    yield from faults


def _time(key: str, asked: Resources, cluster: Cluster, partition: Partition) -> Iterator[Finding]:
    limit = partition.max_time_min
    if limit is not None and asked.time_min > limit:
        what = f"{key}.time_min: {asked.time_min}, but partition {partition.name} ends jobs after {limit} min"
        more = "; a training that needs longer goes on in further segments" if cluster.requeue else ""
        yield _finding("fail", what, f"ask for at most {limit}{more}")
    elif asked.time_min * 60 <= cluster.grace_s:
        what = f"cluster.grace_s: {cluster.grace_s} s is all of {key}.time_min ({asked.time_min} min)"
        yield _finding("fail", what, "lower grace_s, or raise time_min")


def _sends_signal(facts: SlurmFacts) -> bool:
    controller, preempt = (facts.config.get(key, "") for key in ("SlurmctldParameters", "PreemptParameters"))
    return "preempt_send_user_signal" in controller or "send_user_signal" in preempt
