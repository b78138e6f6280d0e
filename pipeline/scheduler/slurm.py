"""What is asked of Slurm and told to it, by its own commands. Works without accounting."""

from __future__ import annotations

import functools
import os
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


def live_jobs(job_ids: Sequence[str]) -> set[str]:
    """Those of the jobs that Slurm holds in its queue (pending, running, requeued, completing).

    When Slurm does not answer, nothing is known: all of them count as living, so that no state is made up, nothing is
    submitted a second time, and a cancellation still reaches them.
    """
    if not job_ids:
        return set()
    try:
        status, text = procs.capture(["squeue", "--noheader", "--format=%i", f"--jobs={','.join(job_ids)}"])
    except procs.NoAnswer:
        return set(job_ids)
    if status == 0:
        return set(text.split()) & set(job_ids)
    return set() if "Invalid job id" in text else set(job_ids)  # it has forgotten every one of them: they are over


def describe_end(job: str) -> str | None:
    """How a job that is over ended, in words; None where Slurm has forgotten it, or says nothing that helps."""
    return _SAID.get(end_state(job))


@functools.lru_cache(256)  # asked for jobs that are over: the answer stays
def end_state(job: str) -> str:
    """Slurm's word for the end of a job that is over; "" where it has forgotten it.

    The controller remembers a job for some minutes; afterwards only accounting does, which not every site has.
    """
    return show(job).get("JobState") or _accounted(job)


def show(job: str) -> dict[str, str]:
    """The controller's fields of a job, by name; empty where it does not know the job."""
    try:
        status, text = procs.capture(["scontrol", "--oneliner", "show", "job", job])
    except UserError:  # no such command here
        return {}
    fields = (word.partition("=") for word in text.split())
    return {name: value for name, equals, value in fields if equals} if status == 0 else {}


def interrupted() -> bool:
    """Whether the TERM that this job got is no end but an interruption: it is preempted, or queued again already."""
    job = job_id()
    if job is None:
        return False
    fields = show(job)
    return _queued_again(fields) or fields.get("JobState") in ("RUNNING", "PREEMPTED")


def requeue() -> None:
    """Put this process's own job back into the queue, unless it is there; Slurm ends what is left of it."""
    job = job_id()
    assert job is not None
    if _queued_again(show(job)):
        return
    status, text = procs.capture(["scontrol", "requeue", job])
    if status != 0:
        raise UserError(f"scontrol requeue {job}: {' '.join(text.split())}; submit again to go on")


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs; raises UserError when Slurm refuses."""
    status, text = procs.capture(["scancel", *job_ids]) if job_ids else (0, "")
    if status != 0:
        raise UserError(f"scancel {' '.join(job_ids)}: {' '.join(text.split())}; run it again")


def _queued_again(fields: Mapping[str, str]) -> bool:
    """Whether Slurm has counted a restart that this process is not part of."""
    return int(fields.get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _accounted(job: str) -> str:
    try:
        status, text = procs.capture(["sacct", "-X", "-P", "-n", "-o", "State", "-j", job])
    except UserError:
        return ""
    words = text.split() if status == 0 else []
    return words[0] if words else ""  # "CANCELLED by 1000"
