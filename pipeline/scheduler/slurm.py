"""What is asked of Slurm and told to it, by its own commands. Works without accounting."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence

from pipeline import procs
from pipeline.errors import UserError

TASK_MARK = "HH_PIPELINE_TASK"
"""In a task of an array: its SLURM_JOB_ID, a colon, and its id. Slurm's own variables of arrays say nothing for sure: a
job that is submitted inside of a task inherits them."""
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
_SILENCE = re.compile(r"[Cc]ontact|[Cc]onnect|[Cc]ommunicat|timed out|Zero Bytes|temporarily")
"""Slurm's words for a controller that is away, in several versions."""
_ends: dict[str, tuple[float, str]] = {}
"""When it was last asked how a job ended, and the answer: a word stays, none may come yet, of accounting."""
_ASK_AGAIN_S = 10.0


def job_id() -> str | None:
    """The id of the Slurm job that this process belongs to, as one of our jobs; None outside.

    A task of an array is 123_4, here and in all records: its SLURM_JOB_ID is a number that squeue does not show, and
    of one task the whole array's.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return None
    job = os.environ.get("SLURM_JOB_ID")
    number, _, task = os.environ.get(TASK_MARK, "").partition(":")
    return task if number == job else job


def preempted(job: str) -> bool:
    """Whether Slurm has decided to preempt the job, which may run on for its grace time; False without an answer."""
    return preempts(_answer(job))


def has_grace(job: str) -> bool:
    """Whether the job, which got a TERM, is preempted but may go on for a grace time; False without an answer."""
    fields = _answer(job)
    return preempts(fields) and runs_on(fields)


def is_batch(job: str) -> bool:
    """Whether the job is a batch script: only those can be requeued, and end with scancel without taking a shell."""
    return _answer(job).get("BatchFlag") == "1"


def in_words(end: str) -> str | None:
    """What Slurm's word for the end of a job means; None where that says nothing which helps."""
    return _SAID.get(end)


def end_state(job: str, since: float = 0.0) -> str:
    """Slurm's word for the end of a job that is over; "" where it has forgotten it. Raises NoAnswer.

    The controller remembers a job for some minutes; afterwards only accounting does, which not every site has. Jobs
    older than a day it looks for only when told `since` when.
    """
    asked, word = _ends.get(job, (float("-inf"), ""))
    if not word and time.monotonic() - asked > _ASK_AGAIN_S:
        word = show(job).get("JobState") or _accounted(job, since)
        _ends[job] = (time.monotonic(), word)
    return word


def show(job: str, timeout_s: float = 60.0) -> dict[str, str]:
    """The controller's fields of a job, by name; empty where it does not know the job, or there is no Slurm.

    Raises NoAnswer where it says nothing.
    """
    try:
        status, text = procs.capture(["scontrol", "--oneliner", "show", "job", job], timeout_s=timeout_s)
    except procs.NoAnswer:
        raise
    except UserError:  # no such command here
        return {}
    if status != 0 and _SILENCE.search(text):
        raise procs.NoAnswer(f"scontrol show job {job}: {' '.join(text.split())}")
    fields = (word.partition("=") for word in text.split())
    return {name: value for name, equals, value in fields if equals}


def on_a_node(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process runs on a node of a Slurm allocation; a shell of salloc may be on the login node still."""
    return "SLURM_JOB_ID" in environ and "SLURMD_NODENAME" in environ


def interrupted(job: str) -> bool:
    """Whether the TERM that a job got is no end but an interruption; False without an answer."""
    return interrupts(_answer(job))


def interrupts(fields: Mapping[str, str]) -> bool:
    """Whether a job with these fields, which got a TERM, is preempted, or queued again already."""
    return queued_again(fields) or preempts(fields) or fields.get("JobState") == "RUNNING"


def preempts(fields: Mapping[str, str]) -> bool:
    """Whether these are the fields of a job that is being preempted."""
    return fields.get("JobState") == "PREEMPTED" or fields.get("PreemptTime", "None") not in ("None", "(null)")


def runs_on(fields: Mapping[str, str]) -> bool:
    """Whether a job with these fields, which got a TERM, may go on for some time before it is ended."""
    return fields.get("JobState") == "RUNNING" and not queued_again(fields)


def near_limit(fields: Mapping[str, str], warning_s: float) -> bool:
    """Whether a job's time limit is `warning_s` away, or up to a minute more, as exactly as Slurm warns."""
    end = moment(fields.get("EndTime", ""))
    return end is not None and end - time.time() < warning_s + 60 and not preempts(fields)


def ends_for_time(fields: Mapping[str, str]) -> bool:
    """Whether these are the fields of a job that is being ended, or was, by its time limit."""
    return fields.get("Reason") == "TimeLimit" and fields.get("JobState") in ("COMPLETING", "TIMEOUT")


def requeue(job: str | None = None, changes: Mapping[str, str] | None = None) -> None:
    """Put this process's own job back into the queue, unless it is there; Slurm ends what is left of it.

    `changes` are what it asks for from now on. A user may change a job that waits, not one that runs; a requeued job
    waits for some seconds before it may start (cred_expire), so the change is in time. A job that may not have what it
    needs is cancelled. Raises UserError when Slurm refuses, or is ending the job for good.
    """
    job = job or job_id()
    assert job is not None
    fields = show(job)
    if not queued_again(fields):
        ends = fields.get("JobState") in ("CANCELLED", "COMPLETING")
        if ends and not ends_for_time(fields) and not preempts(fields):
            raise UserError(f"job {job} is being ended, by scancel or by its node")  # which a requeue would undo
        _order(["scontrol", "requeue", job])
    if changes:
        try:
            update(job, changes)
        except UserError:
            cancel([job])
            raise


def release(job: str) -> None:
    """Let a job, or all tasks of an array, that was submitted held begin; UserError when Slurm refuses."""
    _order(["scontrol", "release", job])


def update(job: str, changes: Mapping[str, str]) -> None:
    """Change what a waiting job asks for; UserError when Slurm refuses."""
    _order(["scontrol", "update", f"JobId={job}", *(f"{name}={value}" for name, value in changes.items())])


def _order(argv: Sequence[str]) -> None:
    status, text = procs.capture(argv)
    if status != 0:
        kind = procs.NoAnswer if _SILENCE.search(text) else UserError
        raise kind(f"{' '.join(argv)}: {' '.join(text.split())}; submit again to go on")


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


def duration(text: str) -> float | None:
    """Seconds of Slurm's [days-][hours:]minutes:seconds; None for anything else, such as UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def moment(text: str) -> float | None:
    """A time as Slurm writes it, in seconds since the epoch; None for anything else, such as Unknown."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def _answer(job: str) -> dict[str, str]:
    try:
        return show(job)
    except procs.NoAnswer:
        return {}


def _accounted(job: str, since: float) -> str:
    start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since))
    try:
        status, text = procs.capture(["sacct", "-X", "-P", "-n", "-o", "State", "-j", job, f"--starttime={start}"])
    except UserError:
        return ""
    words = text.split() if status == 0 else []
    return words[0] if words else ""  # "CANCELLED by 1000"
