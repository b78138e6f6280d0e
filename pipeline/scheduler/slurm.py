"""What is asked of Slurm and told to it, by its own commands. Works without accounting."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Mapping, Sequence

from pipeline import procs
from pipeline.errors import UserError

_SAID = {
    "OUT_OF_MEMORY": "it ran out of memory; raise mem_gb for its stage in the cluster profile",
    "TIMEOUT": "it reached its time limit; raise time_min for its stage in the cluster profile",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not boot",
    "PREEMPTED": "it was preempted and not queued again",
    "CANCELLED": "it was cancelled by scancel",
    "DEADLINE": "it passed its deadline",
}
"""Slurm's words for the end of a job, in ours."""


def job_id() -> str | None:
    """The id of the Slurm job that this process belongs to, as one of our jobs; None outside."""
    return os.environ.get("SLURM_JOB_ID") if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" else None


def preempted(job: str) -> bool:
    """Whether Slurm has decided to preempt the job, which may run on for its grace time."""
    fields = show(job)
    return fields.get("JobState") == "PREEMPTED" or fields.get("PreemptTime", "None") not in ("None", "(null)")


def is_batch(job: str) -> bool:
    """Whether the job is a batch script: only those can be requeued, and end with scancel without taking a shell."""
    return show(job).get("BatchFlag") == "1"


def describe_end(job: str, since: float = 0.0) -> str | None:
    """How a job that is over ended, in words; None where Slurm has forgotten it, or says nothing that helps."""
    return _SAID.get(end_state(job, since))


@functools.lru_cache(256)  # asked for jobs that are over: the answer stays
def end_state(job: str, since: float = 0.0) -> str:
    """Slurm's word for the end of a job that is over; "" where it has forgotten it.

    The controller remembers a job for some minutes; afterwards only accounting does, which not every site has. Jobs
    older than a day it looks for only when told `since` when.
    """
    return show(job).get("JobState") or _accounted(job, since)


def show(job: str) -> dict[str, str]:
    """The controller's fields of a job, by name; empty where it does not know the job."""
    try:
        status, text = procs.capture(["scontrol", "--oneliner", "show", "job", job])
    except UserError:  # no such command here
        return {}
    fields = (word.partition("=") for word in text.split())
    return {name: value for name, equals, value in fields if equals} if status == 0 else {}


def on_a_node(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process runs on a node of a Slurm allocation; a shell of salloc may be on the login node still."""
    return "SLURM_JOB_ID" in environ and "SLURMD_NODENAME" in environ


def interrupted(job: str | None = None) -> bool:
    """Whether the TERM that this job got is no end but an interruption: it is preempted, or queued again already."""
    job = job or job_id()
    if job is None:
        return False
    fields = show(job)
    return queued_again(fields) or fields.get("JobState") in ("RUNNING", "PREEMPTED")


def out_of_time() -> bool:
    """Whether the TERM that this job got is the end of its time limit."""
    job = job_id()
    return job is not None and ends_for_time(show(job))


def ends_for_time(fields: Mapping[str, str]) -> bool:
    """Whether these are the fields of a job that is being ended, or was, by its time limit."""
    return fields.get("Reason") == "TimeLimit" and fields.get("JobState") in ("COMPLETING", "TIMEOUT")


def requeue(job: str | None = None, changes: Mapping[str, str] | None = None) -> None:
    """Put this process's own job back into the queue, unless it is there; Slurm ends what is left of it.

    `changes` are what it asks for from now on. A user may change a job that waits, not one that runs; a requeued job
    waits for some seconds before it may start (cred_expire), so the change is in time. A job that may not have what it
    needs is cancelled.
    """
    job = job or job_id()
    assert job is not None
    if not queued_again(show(job)):
        _order(["scontrol", "requeue", job])
    if changes:
        try:
            update(job, changes)
        except UserError:
            cancel([job])
            raise


def update(job: str, changes: Mapping[str, str]) -> None:
    """Change what a waiting job asks for; UserError when Slurm refuses."""
    _order(["scontrol", "update", f"JobId={job}", *(f"{name}={value}" for name, value in changes.items())])


def _order(argv: Sequence[str]) -> None:
    status, text = procs.capture(argv)
    if status != 0:
        raise UserError(f"{' '.join(argv)}: {' '.join(text.split())}; submit again to go on")


def nodes(partition: str) -> dict[str, tuple[int, str]]:
    """(memory in MB, longest time limit) of each node of a partition that could take a job now or later."""
    states = "--states=idle,allocated,mixed,completing,reserved"
    order = ["sinfo", "--noheader", "--Node", f"--partition={partition}", states, "--format=%N %m %l"]
    status, text = procs.capture(order)
    lines = text.splitlines() if status == 0 else []
    rows = filter(None, (re.fullmatch(r"(\S+) +(\d+)\+? +(\S+) *", line) for line in lines))  # warnings stand between
    return {row[1]: (int(row[2]), row[3]) for row in rows}


def hostnames(expression: str) -> frozenset[str]:
    """The nodes of a list as Slurm writes it, as in n[1-3]; none for its "(null)"."""
    if expression in ("", "(null)"):
        return frozenset()
    status, text = procs.capture(["scontrol", "show", "hostnames", expression])
    return frozenset(text.split()) if status == 0 else frozenset()


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs; raises UserError when Slurm refuses."""
    status, text = procs.capture(["scancel", *job_ids]) if job_ids else (0, "")
    if status != 0:
        raise UserError(f"scancel {' '.join(job_ids)}: {' '.join(text.split())}; run it again")


def queued_again(fields: Mapping[str, str]) -> bool:
    """Whether Slurm has counted a restart that this process is not part of."""
    return int(fields.get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _accounted(job: str, since: float) -> str:
    start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since))
    try:
        status, text = procs.capture(["sacct", "-X", "-P", "-n", "-o", "State", "-j", job, f"--starttime={start}"])
    except UserError:
        return ""
    words = text.split() if status == 0 else []
    return words[0] if words else ""  # "CANCELLED by 1000"
