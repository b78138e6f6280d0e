"""Which failures a retry may cure: too little memory or time, a broken node, a kill from outside."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from pipeline import oom

Kind = Literal["memory", "time", "node", "killed"]

_BROKEN_NODE = re.compile(
    # CUDA and its driver. "out of memory" and "illegal memory access" are the program's, not the node's.
    r"no CUDA-capable device|No CUDA GPUs are available|CUDA driver initialization failed|CUDA unknown error"
    r"|CUDA-capable device\(s\) is/are busy or unavailable|invalid device ordinal|system not yet initialized"
    r"|[Uu]ncorrectable (ECC|NVLink) error|GPU is lost|fallen off the bus|NVIDIA-SMI has failed"
    r"|Driver/library version mismatch|[Ff]ailed to initialize NVML|couldn't communicate with the NVIDIA driver"
    # the container engine
    r"|[Ff]ailed to create user namespace|fuse: device not found|nvidia-container-cli: initialization error"
    # the node's view of a file system
    r"|Stale file handle|Transport endpoint is not connected|\[Errno 5\]|Input/output error|\(os error 5\)"
    # found by the job itself
    r"|GPUs visible, \d+ asked for|scratch folder cannot be used"
)
_OUT_OF_MEMORY = re.compile(r"Out Of Memory|oom-kill event|[Ee]xceeded (job )?memory limit")
"""How srun and slurmstepd say it, in several versions."""
_RANK_KILLED = re.compile(r"exitcode\s*:\s*-9\b")
"""How torch's launcher says that one of its processes was killed."""
LOG_MARK = "pipeline: start "
"""Begins the line in a job's log before which all is of its earlier starts: Slurm appends."""


@dataclass(frozen=True)
class Fault:
    """A failure that another try may cure."""

    kind: Kind
    reason: str
    node: str = ""
    """Of a broken node, its name."""


def of_work(status: int | None, reason: str, log_tail: str, kills_before: int | None) -> Fault | None:
    """What was at fault when a stage's work (or its server: status None) failed; None for a failure of its own.

    `reason` is what is told of it. A work that says itself what is wrong ("error: ...") is taken at its word; else its
    log is searched. A kill by the kernel counts whoever was hit: a rank, a data loader, the server's model process.
    """
    after = oom.kills()
    if after is not None and after > (kills_before or 0):
        return Fault("memory", "it ran out of memory")
    if status == -9 or _RANK_KILLED.search(log_tail):
        return Fault("killed", "it was killed (signal 9)")
    said = f"error: {reason}" in log_tail or status is None
    return of_node(reason if said else log_tail)


def of_node(text: str) -> Fault | None:
    """A broken node, where a line of the text shows one: this node. A traceback's last line is its telling one."""
    for line in reversed(text.splitlines()):
        if _BROKEN_NODE.search(line):
            node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
            return Fault("node", f"{node} is broken: {line.strip().removeprefix('error: ')}", node)
    return None


def of_task(status: int, log_tail: str) -> Fault | None:
    """What was at fault when a job's task ended without a word, by srun's exit status and what Slurm wrote."""
    if _OUT_OF_MEMORY.search(log_tail):
        return Fault("memory", "it ran out of memory")
    if status == 128 + 9:
        return Fault("killed", "it was killed (signal 9)")
    return of_node(log_tail)
