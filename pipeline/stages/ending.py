"""The end of a job before its stages are done: Slurm warns it, ends it, or its work fails; and what becomes of it.

A warning (USR2) comes before the time limit and, on many sites, before preemption; others send TERM for that and leave
the job some time (GraceTime). A training uses it to save. Slurm's last word is TERM, seconds before it kills.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Mapping
from types import FrameType

from pipeline import oom
from pipeline.config.cluster import Cluster
from pipeline.config.load import read_config
from pipeline.errors import UserError
from pipeline.procs import NoAnswer
from pipeline.run import atomic
from pipeline.run.directory import RunDir
from pipeline.run.progress import saved_steps
from pipeline.scheduler import slurm
from pipeline.scheduler.state import recorded_state, set_state
from pipeline.stages import faults, retry
from pipeline.stages.execute import StageFailed, StageStopped
from pipeline.stages.names import TRAININGS

log = logging.getLogger("pipeline")

REQUEUED = "requeued"
"""Text of a STOP flag that a job wrote for itself, because Slurm is about to end it."""
_ASK_S = 10.0
"""For a question to Slurm between its TERM and the kill, which may be 30 seconds later."""
_PAUSES_S = (2.0, 5.0, 10.0)
"""Before a controller that is away is told again to requeue the job; Slurm kills 30 seconds after TERM, as a rule."""
_TOO_SHORT = "its time limit left no time to train; raise time_min for its stage in the cluster profile"
_OUT_OF_TIME = "it reached its time limit; raise time_min for its stage in the cluster profile"


class Terminated(BaseException):
    """The job is over: it was asked to end (SIGTERM)."""


class Ending:
    """Answers the signals that this start of a job gets, and settles its stages' states when it ends early."""

    def __init__(self, run: RunDir, submission: str, names: tuple[str, ...]) -> None:
        self._run = run
        self._submission = submission
        self._names = names
        self._trains = names[-1] in TRAININGS
        self._flag = run.save_flag(names[-1])
        self._saved = saved_steps(run, names[-1])
        self._kills = oom.kills()
        self._asked = self._warned = False
        self._queued = False
        """Whether this process has put the job back into the queue already."""
        self._fields: Mapping[str, str] | None = {}
        """What Slurm said of the job when it ended it; None when it did not answer."""

    def listen(self) -> None:
        """Take the job's signals over, in the main thread. USR2 from submitit's handler, which would end the job."""
        signal.signal(signal.SIGTERM, self._on_term)
        if slurm.job_id() is None:
            return
        signal.signal(signal.SIGUSR2, self._on_warning)

    def begin(self) -> None:
        """The job is the one that the submission means: an earlier start's request to save is not for it."""
        # A server that comes back first must not take the training's request away.
        if self._trains and slurm.job_id() is not None and not self._warned:
            self._forget_request()

    def settle(self, error: BaseException) -> None:
        """Decide and record what becomes of the stages that `error` ended. Other errors are nobody's to answer."""
        if isinstance(error, Terminated):
            self._after_term()
        elif isinstance(error, StageStopped):
            self._after_save(error)
        elif isinstance(error, StageFailed):
            self._failed(error.fault, str(error), error.attempt)
        elif isinstance(error, Exception):  # anything but a UserError is a bug: its traceback is in the job's log
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self._failed(faults.of_work(None, reason, "", self._kills), reason, self._attempt())

    def _on_warning(self, number: int, frame: FrameType | None) -> None:
        """A training saves at its next step and stops, a server on its own ends, to come back; other work goes on."""
        if not self._cluster().requeue:
            return
        if self._names == ("serve",) and (fields := self._ask()) is not None:  # without an answer it waits for the TERM
            self._fields = fields
            self._leave()
        if self._trains:
            self._ask_to_save()

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        """End, unless the job runs on for a grace time, in which its training can save."""
        if slurm.job_id() is None:
            self._leave()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # while Slurm is asked
        self._fields = self._ask()
        if self._trains and not self._asked and slurm.runs_on(self._fields or {}):
            self._asked = True  # the next one is the last
            self._ask_to_save()
            signal.signal(signal.SIGTERM, self._on_term)
            return
        if slurm.ends_for_time(self._fields or {}):
            self._out_of_time()  # at once: Slurm soon kills what is left of this start
        self._leave()

    def _leave(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; what follows ends the children in order
        raise Terminated

    def _ask(self) -> Mapping[str, str] | None:
        job = slurm.job_id()
        try:
            return slurm.show(job, _ASK_S) if job else {}
        except NoAnswer as silence:
            log.warning("%s", silence)
            return None

    def _ask_to_save(self) -> None:
        self._warned = True
        if not self._flag.exists():
            atomic.write_text(self._flag, REQUEUED)

    def _out_of_time(self) -> None:
        """A training that is nearer to its end than it was at its start just goes on."""
        done = self._recorded_good()
        if (done or (self._trains and self._advanced())) and self._cluster().requeue:
            self._requeue()  # what is done already is skipped, and those that wait for the job are not cancelled
        elif not done:
            self._failed(faults.Fault("time", "it reached its time limit"), _OUT_OF_TIME, self._attempt())

    def _advanced(self) -> bool:
        return saved_steps(self._run, self._names[-1]) > self._saved

    def _after_term(self) -> None:
        """The job tries again, was interrupted without a warning before, or is asked to end for good."""
        if retry.queued(self._run, self._submission, self._names):
            return
        if self._fields is None or (slurm.ends_for_time(self._fields) and not self._queued):
            return  # that has been settled; or why it ends is not known, and is asked by whoever looks at the states
        if self._queued or slurm.interrupts(self._fields):
            self._requeue()  # again, where the end of the work has written states since
        else:
            self._record("cancelled", "the job was asked to end")

    def _after_save(self, stopped: StageStopped) -> None:
        """A training that Slurm interrupted goes on later; a person's request stops it.

        Warned of its time limit before its first update, it would get no further at its next start.
        """
        if not self._requested():
            set_state(self._run, self._names[-1], self._submission, "stopped", str(stopped), stopped.attempt)
        elif self._advanced() or not slurm.near_limit(self._ask() or {}, self._cluster().grace_s):
            self._requeue()
        else:
            self._forget_request()
            self._failed(faults.Fault("time", "its time limit left no time to train"), _TOO_SHORT, stopped.attempt)

    def _requeue(self) -> None:
        """Put the job back into the queue; its dependents keep waiting for it. Says so where that is not allowed."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm sends it for what is done here
        self._forget_request()
        if not self._cluster().requeue:
            self._record("stopped", "Slurm ended the job; submit again to go on")
            return
        self._set("pending", "interrupted by Slurm; it waits in the queue again")
        for pause_s in () if self._queued else (*_PAUSES_S, None):
            try:
                slurm.requeue()
                self._queued = True
                return
            except UserError as refusal:
                log.warning("%s", refusal)
                if pause_s is None or not isinstance(refusal, NoAnswer):
                    self._set("stopped", f"interrupted by Slurm, which does not queue it again: {refusal}")
                    return
                time.sleep(pause_s)

    def _set(self, state: str, reason: str) -> None:
        for name in self._names:
            set_state(self._run, name, self._submission, state, reason, self._attempt(name))

    def _failed(self, fault: faults.Fault | None, reason: str, attempt: int = 0) -> None:
        retry.failed(self._run, self._submission, self._names, fault, reason, attempt)

    def _record(self, state: str, reason: str) -> None:
        """Of all stages that have not said themselves how they ended."""
        for name in self._names:
            recorded = recorded_state(self._run, name)
            if recorded is None or recorded.submission != self._submission or not recorded.ended:
                set_state(self._run, name, self._submission, state, reason, self._attempt(name))

    def _attempt(self, name: str | None = None) -> int:
        recorded = recorded_state(self._run, name or self._names[-1])
        return recorded.attempt if recorded and recorded.submission == self._submission else 0

    def _recorded_good(self) -> bool:
        recorded = recorded_state(self._run, self._names[-1])
        return recorded is not None and recorded.submission == self._submission and recorded.good

    def _requested(self) -> bool:
        """Whether the STOP flag is the job's own, and not a person's."""
        return self._flag.exists() and self._flag.read_text() == REQUEUED

    def _forget_request(self) -> None:
        """Remove the job's own STOP flag: it has been obeyed, or came too late."""
        if self._requested():
            self._flag.unlink()

    def _cluster(self) -> Cluster:
        return read_config(self._run.root).cluster
