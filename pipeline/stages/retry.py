"""A job that failed tries again: under its own id, with more memory or time, or on another node.

Two places notice a failure. The job's own process, where its work or its server was hit, or time ran out; and the
job's script, which Slurm leaves alive when it kills that process: `python -m pipeline.stages.retry RUN JOB SUBMISSION
STATUS`, with srun's exit status. Nothing has to stay alive elsewhere.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config.cluster import Cluster
from pipeline.config.load import read_config
from pipeline.errors import UserError, run_command
from pipeline.procs import NoAnswer
from pipeline.run import bad_nodes, events
from pipeline.run.directory import RunDir
from pipeline.scheduler import exclusion, needs, retries, slurm
from pipeline.scheduler.needs import Need
from pipeline.scheduler.retries import Record, Room
from pipeline.scheduler.state import recorded_state, set_state
from pipeline.stages import faults
from pipeline.stages.faults import Fault

_TAIL = 65536


def failed(
    run: RunDir, submission: str, names: tuple[str, ...], fault: Fault | None, reason: str, attempt: int = 0
) -> None:
    """Try again where the profile allows it and it may help; else record the failure, and why it is final."""
    if fault is not None and slurm.job_id() is not None:
        cluster = read_config(run.root).cluster
        final = _try_again(run, cluster, submission, names, fault) if cluster.retries else ""
        if final is None:
            return
        reason = "; ".join(filter(None, (reason, final)))
    set_state(run, names[-1], submission, "failed", reason, attempt)


def queued(run: RunDir, submission: str, names: tuple[str, ...]) -> bool:
    """Whether this start of the job is over because it tries again. States that its end wrote since are set right."""
    job, folder = slurm.job_id(), _folder(run, submission, names)
    if job is None or not retries.claimed(folder, job, _restart()):
        return False
    for name in names:
        recorded = recorded_state(run, name)
        if recorded is None or recorded.state != "pending":
            set_state(run, name, submission, "pending", retries.records(folder)[-1].text)
    return True


def note(run: RunDir, submission: str, names: tuple[str, ...], reason: str) -> str:
    """Why a stage runs: as planned, or as a retry."""
    done = retries.records(_folder(run, submission, names))
    return done[-1].text if done else reason


def _try_again(run: RunDir, cluster: Cluster, submission: str, names: tuple[str, ...], fault: Fault) -> str | None:
    """Queue the job again, unless that has happened; returns why not, where no other try is left."""
    job, folder, stage = slurm.job_id(), _folder(run, submission, names), names[-1]
    assert job is not None
    if retries.claimed(folder, job, _restart()):
        return None
    try:
        fields, done = slurm.show(job), retries.records(folder)
    except NoAnswer as silence:
        return f"no retry: {silence}"
    cpus = max(cluster.resources(name).cpus for name in names)
    if slurm.queued_again(fields):  # Slurm did it: what failed was hit by that
        for name in names:
            set_state(run, name, submission, "pending", "interrupted by Slurm; it waits in the queue again")
        return None
    if fields.get("JobState") != "RUNNING" and not slurm.ends_for_time(fields):
        return "no retry: Slurm ends the job"
    avoided = slurm.hostnames(fields.get("ExcNodeList", "")) | {bad.node for bad in bad_nodes.known(run)}
    asked = retries.asked(cluster, fields, cpus, avoided)
    retry = retries.decide(cluster, fault, asked, _room(fields), len(done))
    if isinstance(retry, str):
        return f"no retry: {retry}{_forgive(run, submission, cluster, done, fault)}"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from here to the end; the requeue itself brings one
    if not retries.claim(folder, job, _restart(), fault, retry):
        return None  # the job's other process was first
    if retry.without:
        bad_nodes.remember(run, retry.without, fault.reason)
    if retry.mem_gb or retry.time_min:
        needs.remember(run, stage, Need(retry.mem_gb, retry.time_min, fault.reason))
    for name in names:
        set_state(run, name, submission, "pending", str(retry))
    events.record(run, "retry", job="+".join(names), job_id=job, kind=fault.kind, reason=str(retry))
    print(f"pipeline: {retry}", file=sys.stderr, flush=True)
    try:
        slurm.requeue(changes=retries.changes(cluster, retry, cpus, fields.get("ExcNodeList", "")))
    except UserError as error:
        retries.withdraw(folder, job, _restart())
        return f"no retry: {error}"
    if retry.without:  # when the retry is certain: it takes some questions to Slurm
        exclusion.avoid(run, submission, retry.without)
    return None


def _forgive(run: RunDir, submission: str, cluster: Cluster, done: Sequence[Record], fault: Fault) -> str:
    """Nodes on which the same job failed one after the other are not what is broken: other jobs may use them."""
    blamed = {record.node for record in done if record.kind == "node"} | {fault.node}
    if fault.kind != "node" or len(blamed) < 2:
        return ""
    for node in blamed:
        bad_nodes.forget(run, node)
    exclusion.allow(run, submission, sorted(blamed), cluster.exclude)
    return f"; it failed so on {', '.join(sorted(blamed))}, so the nodes are hardly the reason"


def _room(fields: Mapping[str, str]) -> Room:
    """What the job's partition could give."""
    nodes = slurm.nodes(fields.get("Partition", ""))
    limits = [retries.minutes(limit) for _, limit in nodes.values()]
    memory = max((megabytes for megabytes, _ in nodes.values()), default=0) // 1024
    return Room(memory, 0 if 0 in limits else max(limits, default=0), frozenset(nodes))


def _folder(run: RunDir, submission: str, names: tuple[str, ...]) -> Path:
    return run.root / "jobs" / f"{submission}-{'+'.join(names)}"


def _restart() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _job_log(folder: Path, job: str) -> str:
    """The end of what this start of a job, and Slurm about it, wrote to its log."""
    path = folder / f"{job}_0_log.err"
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        return file.read().decode("utf-8", "replace").rpartition(faults.LOG_MARK)[2]


def main(argv: Sequence[str]) -> int:
    """The command at the end of a job's script. What the job said of its end itself stands."""
    run, names, submission, status = RunDir(Path(argv[0])), tuple(argv[1].split("+")), argv[2], int(argv[3])
    job = slurm.job_id()
    recorded = recorded_state(run, names[-1])
    said = recorded is not None and recorded.submission == submission and recorded.ended
    if job is None or said or queued(run, submission, names):
        return 0
    fault = faults.of_task(status, _job_log(_folder(run, submission, names), job))
    if fault is not None:
        attempt = recorded.attempt if recorded and recorded.submission == submission else 0
        failed(run, submission, names, fault, fault.reason, attempt)
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
