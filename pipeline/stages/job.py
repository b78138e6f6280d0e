"""What runs inside a job: wait for what it needs, then run its stages one after another.

submitit calls `run_job` with strings only, and other jobs run `main`; everything else is in the run directory.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from pipeline import procs
from pipeline.config.load import read_config
from pipeline.errors import UserError
from pipeline.run import hashing
from pipeline.run.directory import RunDir
from pipeline.run.sources import check_sources
from pipeline.scheduler import slurm
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.state import resolve, set_state
from pipeline.scheduler.submission import Job, Submission
from pipeline.stages import further_nodes, retry
from pipeline.stages.base import Context
from pipeline.stages.devices import granted_devices
from pipeline.stages.ending import Ending, Terminated
from pipeline.stages.execute import STOPPED, StageFailed, StageStopped, Superseded, run_stage
from pipeline.stages.node_share import do_share
from pipeline.stages.nodes import MEETING, Nodes, lead, of_job
from pipeline.stages.plan import verdict
from pipeline.stages.registry import REGISTRY
from pipeline.stages.service import serve_alone, serve_train, train_beside_server

log = logging.getLogger("pipeline")

VISIBLE_DEVICES = "HH_PIPELINE_VISIBLE_DEVICES"
"""Carries the submitter's CUDA_VISIBLE_DEVICES past submitit's local executor, which overwrites it."""


def run_job(run_dir: str, stages: str, submission_id: str) -> str:
    """Run a job's stages ("+"-joined); returns a word for submitit's result file. Raises when a stage fails."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    run = RunDir(Path(run_dir))
    names = tuple(stages.split("+"))
    if os.environ.get("SUBMITIT_EXECUTOR") == "local":
        procs.die_with_parent(int(os.environ["SUBMITIT_LOCAL_JOB_ID"]))  # the controller, whose child this is
        _restore_devices()
    nodes = of_job()
    if not nodes.leads:
        _listen_to_leader()
        os.environ |= {procs.RUN_MARK: str(run.root), procs.STAGE_MARK: stages}
        do_share(run, read_config(run.root), names, nodes)
        return "done"
    return lead(run, nodes, lambda: _do_job(run, stages, submission_id, nodes))


def _do_job(run: RunDir, stages: str, submission_id: str, nodes: Nodes) -> str:
    """The job, on its first node."""
    names = tuple(stages.split("+"))
    ending = Ending(run, submission_id, names)
    ending.listen()
    os.environ[procs.RUN_MARK] = str(run.root)
    os.environ[procs.STAGE_MARK] = stages
    # A job that has no business here says so and writes nothing: the states are another's.
    submission = _adopt(run, _wait_for_record(run, submission_id), names)
    ending.begin()
    job = submission.job_of(names[0])
    assert job is not None
    try:
        if not _wait_for_parents(run, submission, job):
            return "cancelled"
        # An earlier attempt's processes cannot outlive it, but a killed one may be a moment in dying.
        procs.end_marked(run.root, (procs.STAGE_MARK, stages), grace_s=0.0)
        with further_nodes.started(run, read_config(run.root).cluster, submission, job, nodes):
            _run_stages(run, submission, names)
    except BaseException as error:
        ending.settle(error)
        raise
    return "done"


def _run_stages(run: RunDir, submission: Submission, names: tuple[str, ...]) -> None:
    """A job holds one stage, or the server and its training; the last of them is the one that counts."""
    if names[-1] == "train":
        _train(run, submission, names)
    elif names == ("serve",):
        serve_alone(run, read_config(run.root), submission, of_job())
    else:
        (name,) = names
        _run_one(run, submission, name)


def _run_one(run: RunDir, submission: Submission, stage: str) -> None:
    """Run one stage, unless its outputs turn out to be what it would make."""
    context = _context(run)
    planned = verdict(REGISTRY[stage], context)
    forced = stage in submissions.still_forced(run, submission.forced, submission)
    if planned.action == "skip" and not forced:
        set_state(run, stage, submission.id, "skipped", _kept(run, stage, planned.reason))
        return
    check_sources(run, context.config, stage)
    reason = retry.note(run, submission.id, (stage,), "forced" if forced else planned.reason)
    devices = granted_devices(context.config.cluster, (stage,))
    run_stage(context, stage, submission.id, reason, devices, forced=forced)


def _train(run: RunDir, submission: Submission, names: tuple[str, ...]) -> None:
    """Train, with the server in this job, in another one, or without one of this run's."""
    context = _context(run)
    planned = verdict(REGISTRY["train"], context)
    forced = "train" in submissions.still_forced(run, submission.forced, submission)
    if planned.action == "skip" and not forced:
        if "serve" in names:
            set_state(run, "serve", submission.id, "skipped", "not needed: train is up to date")
        set_state(run, "train", submission.id, "skipped", _kept(run, "train", planned.reason))
        return
    check_sources(run, context.config, "train")
    reason = retry.note(run, submission.id, names, "forced" if forced else planned.reason)
    nodes = of_job()
    if "serve" in names:
        serve_train(context, submission.id, reason, forced, nodes)
    elif submission.job_of("serve") is not None:
        train_beside_server(context, submission, reason, forced, nodes)
    else:
        devices = granted_devices(context.config.cluster, ("train",))
        run_stage(context, "train", submission.id, reason, devices, forced=forced, nodes=nodes)


def _kept(run: RunDir, stage: str, reason: str) -> str:
    """What to say of a stage that keeps its outputs: why, and what they are."""
    headline = REGISTRY[stage].headline(run.values(stage))
    return f"{reason}; {headline}" if headline else reason


def _context(run: RunDir) -> Context:
    return Context(run, read_config(run.root), hashing.HashCache(run.root / "cache" / "hashes.json"))


def _wait_for_record(run: RunDir, submission_id: str) -> Submission:
    """The submission, once this job's own id stands in it: the job may start before that is written."""
    deadline = time.monotonic() + 60
    while True:
        submission = submissions.find(run, submission_id)
        if submission is None:
            raise UserError(f"{run.root}: this job belongs to submission {submission_id}, which was replaced")
        if all(job.job_id is not None for job in submission.jobs) or time.monotonic() > deadline:
            return submission
        time.sleep(0.05)


def _adopt(run: RunDir, submission: Submission, names: tuple[str, ...]) -> Submission:
    """The submission with this Slurm job in it, though its script was submitted again by hand, or its submitter ended.

    Raises UserError when the job that it would replace is alive, or when the submission has no such job.
    """
    job = submission.job_of(names[0])
    if job is None or job.stages != names:
        raise UserError(f"{run.root}: submission {submission.id} has no job {'+'.join(names)}; submit again")
    mine = slurm.job_id()
    if mine is None or job.job_id == mine:
        return submission
    if job.job_id is not None and submissions.job_alive(submission, job):
        raise UserError(f"{run.root}: job {job.job_id} does this already; scancel it first, or wait for it")
    return submissions.adopt(run, submission, job, mine)


def _wait_for_parents(run: RunDir, submission: Submission, job: Job) -> bool:
    """Wait until the stages that this job needs have ended; False, and cancelled, when one did not end well.

    Slurm starts a job only then; local jobs start at once and wait here.
    """
    for stage in job.stages:
        set_state(run, stage, submission.id, "waiting" if job.waits_for else "pending")
    for parent in job.waits_for:
        while not (state := resolve(run, submission, parent)).ended:
            time.sleep(0.25)
        if not state.good:
            for stage in job.stages:
                set_state(run, stage, submission.id, "cancelled", f"{parent} {state.state}")
            return False
    return True


def _restore_devices() -> None:
    visible = os.environ.pop(VISIBLE_DEVICES, "")
    if visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    else:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)


def _listen_to_leader() -> None:
    """What Slurm says to all of a job's tasks is the leader's to answer; a task of its own making ends when told."""
    # Handlers that do nothing: what is ignored would be ignored by the work too, which must end when told.
    signal.signal(signal.SIGUSR2, lambda number, frame: None)
    signal.signal(signal.SIGTERM, _terminate if MEETING in os.environ else lambda number, frame: None)


def _terminate(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def main(argv: list[str]) -> int:
    """`python -m pipeline.stages.job RUN STAGES SUBMISSION`, the command of an sbatch script."""
    try:
        word = run_job(*argv)
    except Terminated:
        return 128 + signal.SIGTERM
    except (StageFailed, Superseded, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except StageStopped as stopped:
        print(stopped, file=sys.stderr)
        return STOPPED
    return 0 if word == "done" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
