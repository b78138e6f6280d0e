"""The nodes of one job: the first one's task leads, the others follow it through files in the run directory.

srun starts one task a node. The leader does what a job does and says in a rendezvous file where the training's
processes meet; each other task starts its share of them (and its own reward server) and reports how that ended. No
task ends the job but the leader: srun's own rules would take a lost node for an interruption.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.run import atomic
from pipeline.run.directory import RunDir
from pipeline.run.watch import Watch
from pipeline.stages.faults import Fault

SPREAD = frozenset({"serve", "train"})
"""The stages that use all nodes of their job; the work of others fits one."""
MEETING = "HH_PIPELINE_MEETING"
"""Environment variable with the name of a job's meeting, where the job is a process inside an allocation."""
FOLLOWS = "HH_PIPELINE_FOLLOWS"
"""Environment variable that is set in the tasks which such a job starts on the allocation's further nodes."""
BEAT_S = 5.0
LOST_S = 120.0
"""A task that has shown no life for so long is gone; shared file systems show new files late."""
CALL_S = 900.0
"""The same of a leader that has not called yet: it may wait for the submission's record, or hash large models."""
HEAR_S = 30.0
"""How long a failure that does not say why waits for the word of the node that it may come from."""
DONE = "done"
"""The file in a meeting's folder that tells the job's script that the job's work is done."""


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


def folder_of(run_root: Path, start: str) -> Path:
    """The folder of a meeting; `start` names the job and its start."""
    return run_root / "jobs" / f"meeting-{start}"


@dataclass(frozen=True)
class Rendezvous:
    """What the followers need to know of the leader's attempt at a stage."""

    stage: str
    attempt: int = 0
    fingerprint: str = ""
    """Value of the variable that names the checkpoints' folder."""
    address: str = ""
    port: int = 0
    devices: int = 0
    """GPUs that train on the first node; each node must have as many."""


def of_job(environ: Mapping[str, str] = os.environ) -> Nodes:
    """The nodes of the Slurm job, or of the allocation, that this task belongs to; one outside of them."""
    if MEETING in environ:
        rank = int(environ["SLURM_PROCID"]) + 1 if FOLLOWS in environ else 0
        return Nodes(int(environ.get("SLURM_JOB_NUM_NODES", "1")), rank)
    if environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return ONE_NODE
    return Nodes(int(environ.get("SLURM_NNODES", "1")), int(environ.get("SLURM_PROCID", "0")))


class Lost(Exception):
    """A further node's work is over too early."""

    def __init__(self, reason: str, cause: Fault | None) -> None:
        super().__init__(reason)
        self.cause = cause
        """What another try may cure, if that is known."""


class Meeting:
    """The files of one start of one job: a requeued job has new ones."""

    def __init__(self, run: RunDir, environ: Mapping[str, str] = os.environ) -> None:
        start = f"{environ.get('SLURM_JOB_ID', 'local')}-{environ.get('SLURM_RESTART_COUNT', '0')}"
        self._folder = folder_of(run.root, environ.get(MEETING) or start)
        self._beaten = float("-inf")
        self._said: dict[str, Any] = {}
        self._watches: defaultdict[int, Watch] = defaultdict(Watch)

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
            self._said |= word
            atomic.write_json(self._file(rank), {"time": time.time(), "host": os.uname().nodename, **self._said})

    def word(self, rank: int) -> dict[str, Any]:
        """What a task said last; empty when it has said nothing yet."""
        word: dict[str, Any] | None = atomic.read_json(self._file(rank))
        return word or {}

    def over(self, patience_s: float | None = None) -> bool:
        """Follower: whether the leader's work is over, or the leader has shown no life for so long: LOST_S."""
        word = self.word(0)
        return "status" in word or self._watches[0].still_s(word) > (LOST_S if patience_s is None else patience_s)

    def fault(self, count: int) -> Lost | None:
        """Leader: why a follower's work is over though the leader's is not; None while all is well."""
        lost = [found for rank in range(1, count) if (found := self._lost(rank)) is not None]
        return next((one for one in lost if one.cause is not None), lost[0] if lost else None)

    def all_said(self, count: int) -> bool:
        """Leader: whether every follower has said how its work ended."""
        return all({"status", "reason"} & self.word(rank).keys() for rank in range(1, count))

    def end(self, done: bool = False) -> None:
        """Leader: the work is over, whatever came of it. `done`: so is the job's, whatever comes of the other tasks."""
        if done:
            atomic.write_text(self._folder / DONE, "")
        self.beat(0, status="ended")

    def _lost(self, rank: int) -> Lost | None:
        word = self.word(rank)
        if "status" in word:
            return None  # its share of the training is done
        if "reason" in word:
            cause = word.get("fault")
            return Lost(f"node {rank} ({word['host']}): {word['reason']}", Fault(**cause) if cause else None)
        if self._watches[rank].still_s(word) > LOST_S:
            reason = f"node {rank} has shown no life for {LOST_S:.0f} s"
            return Lost(reason, Fault("killed", reason))
        return None

    def _file(self, rank: int) -> Path:
        return self._folder / f"node-{rank}.json"


def lead(run: RunDir, nodes: Nodes, work: Callable[[], str]) -> str:
    """Do the first node's `work`, which returns "done" when the job's is. The others hear at once that it is there."""
    if nodes.count == 1:
        return work()
    meeting = Meeting(run)
    meeting.beat(0)
    word = ""
    try:
        word = work()
        return word
    finally:
        meeting.end(done=word == "done")


class Leader:
    """What the first node does for the others while its own share of a stage's work runs; on one node, nothing."""

    def __init__(self, run: RunDir, count: int) -> None:
        self._meeting = Meeting(run)
        self._count = count
        self._seen: float | None = None

    @contextlib.contextmanager
    def calling(self, rendezvous: Rendezvous) -> Iterator[None]:
        """Let the others begin; at the end they are told."""
        if self._count == 1:
            yield
            return
        self.beat()
        self._meeting.call(rendezvous)
        try:
            yield
        finally:
            self._meeting.end()

    def beat(self) -> None:
        """Show life."""
        if self._count > 1:
            self._meeting.beat(0)

    def lost(self) -> Lost | None:
        """A further node whose work is over too early."""
        return self._meeting.fault(self._count)

    def look(self) -> None:
        """Show life, and raise Lost when a further node's work is over too early.

        One that does not say why may have been hit by the failure of another node, which is heard first, or of this.
        """
        self.beat()
        lost = self.lost()
        if lost is None:
            return
        self._seen = self._seen or time.monotonic()
        if lost.cause is not None or time.monotonic() - self._seen > HEAR_S:
            raise lost

    def _words(self) -> list[dict[str, Any]]:
        return [self._meeting.word(rank) for rank in range(1, self._count)]

    def hear(self) -> Lost | None:
        """What failed on a further node before this one's work did, or what another try may cure there: this one's has
        failed, maybe because of that."""
        first, began = self.lost(), time.monotonic()
        before = self._words()
        while (waited := time.monotonic() - began) < LOST_S + BEAT_S and not self._meeting.all_said(self._count):
            silent = any(now == word for now, word in zip(self._words(), before, strict=True))
            if waited > HEAR_S and not silent:
                break  # those that live have nothing to say
            self.beat()
            time.sleep(0.2)
        lost = self.lost()
        return lost if lost is not None and lost.cause is not None else first
