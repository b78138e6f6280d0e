"""The nodes of one job: the first one's task leads, the others follow it through files in the run directory.

srun starts one task a node. The leader does what a job does and says in a rendezvous file where the training's
processes meet; each other task starts its share of them (and its own reward server) and reports how that ended. No
task ends the job but the leader: srun's own rules would take a lost node for an interruption.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.run import atomic
from pipeline.run.directory import RunDir
from pipeline.stages.faults import Fault

MEETING = "HH_PIPELINE_MEETING"
"""Environment variable with the name of a job's meeting, where the job is a process inside an allocation."""
FOLLOWS = "HH_PIPELINE_FOLLOWS"
"""Environment variable that is set in the tasks which such a job starts on the allocation's further nodes."""
BEAT_S = 5.0
LOST_S = 120.0
"""A task that has shown no life for so long is gone; shared file systems show new files late."""


@dataclass(frozen=True)
class Nodes:
    """How many nodes the job has, and which of them this task is on."""

    count: int = 1
    rank: int = 0
    address: str = "127.0.0.1"
    """Where the first node can be reached."""
    port: int = 0
    """Where the training's processes meet; 0 lets the launcher choose, on one node."""

    @property
    def leads(self) -> bool:
        return self.rank == 0


ONE_NODE = Nodes()


@dataclass(frozen=True)
class Rendezvous:
    """What the followers need to know of the leader's attempt at a stage."""

    stage: str
    attempt: int
    fingerprint: str
    """Value of the variable that names the checkpoints' folder."""
    address: str
    port: int
    devices: int
    """GPUs that train on the first node; each node must have as many."""


def of_job(environ: Mapping[str, str] = os.environ) -> Nodes:
    """The nodes of the Slurm job, or of the allocation, that this task belongs to; one outside of them."""
    if MEETING in environ:
        rank = int(environ["SLURM_PROCID"]) + 1 if FOLLOWS in environ else 0
        return Nodes(int(environ.get("SLURM_JOB_NUM_NODES", "1")), rank)
    if environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return ONE_NODE
    return Nodes(int(environ.get("SLURM_NNODES", "1")), int(environ.get("SLURM_PROCID", "0")))


@dataclass(frozen=True)
class Lost:
    """What became of a follower whose work is over too early."""

    reason: str
    cause: Fault | None

    def __str__(self) -> str:
        return self.reason


class Meeting:
    """The files of one start of one job: a requeued job has new ones."""

    def __init__(self, run: RunDir, environ: Mapping[str, str] = os.environ) -> None:
        job, restart = environ.get("SLURM_JOB_ID", "local"), environ.get("SLURM_RESTART_COUNT", "0")
        self._folder = run.root / "jobs" / f"meeting-{environ.get(MEETING) or f'{job}-{restart}'}"
        self._beaten = 0.0

    def call(self, rendezvous: Rendezvous) -> None:
        """Leader: let the followers begin."""
        atomic.write_json(self._folder / "rendezvous.json", asdict(rendezvous))

    def called(self) -> Rendezvous | None:
        """Follower: what to do, once the leader knows it."""
        raw = atomic.read_json(self._folder / "rendezvous.json")
        return Rendezvous(**raw) if raw is not None else None

    def beat(self, rank: int, **word: Any) -> None:
        """Show life, at most every BEAT_S seconds unless there is a word to say: status=…, or reason=… and fault=…."""
        if word or time.monotonic() - self._beaten >= BEAT_S:
            self._beaten = time.monotonic()
            atomic.write_json(self._file(rank), {"time": time.time(), "host": os.uname().nodename, **word})

    def word(self, rank: int) -> dict[str, Any] | None:
        """What a task said last; None when it has said nothing yet."""
        word: dict[str, Any] | None = atomic.read_json(self._file(rank))
        return word

    def lost(self, rank: int, since: float) -> bool:
        """Whether a task has shown no life lately. `since` is when it began to be expected (time.time())."""
        word = self.word(rank)
        return time.time() - max(since, word["time"] if word else 0.0) > LOST_S

    def fault(self, count: int, since: float) -> Lost | None:
        """Leader: why a follower's work is over though the leader's is not; None while all is well."""
        for rank in range(1, count):
            word = self.word(rank) or {}
            if word.get("reason"):
                cause = word.get("fault")
                return Lost(f"node {rank} ({word['host']}): {word['reason']}", Fault(**cause) if cause else None)
            if "status" not in word and self.lost(rank, since):
                reason = f"node {rank} has shown no life for {LOST_S:.0f} s"
                return Lost(reason, Fault("killed", reason))
        return None

    def end(self) -> None:
        """Leader: the work is over, whatever came of it."""
        if self._folder.is_dir():
            self.beat(0, status="ended")

    def _file(self, rank: int) -> Path:
        return self._folder / f"node-{rank}.json"
