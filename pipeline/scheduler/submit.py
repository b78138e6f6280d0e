"""From a plan to submitted jobs: grouping, the submission record, what is already running."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace

from pipeline.config import load
from pipeline.config.schema import Config
from pipeline.containers.trainer import image_digest
from pipeline.errors import UserError
from pipeline.run import atomic, endpoint, events, provenance
from pipeline.run.directory import RunDir
from pipeline.run.hashing import HashCache
from pipeline.scheduler import needs, slurm
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.state import set_state
from pipeline.scheduler.submission import Job, Submission
from pipeline.stages.names import STAGES, TRAININGS
from pipeline.stages.plan import Planned
from pipeline.stages.registry import REGISTRY

log = logging.getLogger("pipeline")


def group_jobs(config: Config, plan: Sequence[Planned]) -> tuple[Job, ...]:
    """The jobs of the stages that run or may run: one a stage, but colocated server and training together.

    A server in a job of its own never ends well before its training: the training's job waits for its start only.
    """
    planned = {each.stage: each for each in plan if each.action != "skip"}
    stages = list(planned)
    separate = config.cluster.placement == "separate"
    jobs = []
    for stage in stages:
        if stage == "serve" and "train" in stages and not separate:
            continue
        served = stage == "train" and "serve" in stages
        members = ("serve", "train") if served and not separate else (stage,)
        beside = ("serve",) if served and separate else ()
        wanted = {need for member in members for need in _parents(config, member)} & set(stages)
        if config.cluster.executor == "allocation":
            wanted |= _same_devices(stage, stages)
        waits_for = tuple(name for name in STAGES if name in wanted - set(members) - {"serve"})
        mem_gb, time_min = (max(getattr(planned[one], key) for one in members) for key in ("mem_gb", "time_min"))
        jobs.append(Job(members, waits_for, beside, mem_gb=mem_gb, time_min=time_min))
    return tuple(jobs)


def divide(config: Config, plan: Sequence[Planned]) -> tuple[list[Planned], list[Planned]]:
    """(here, rest): of the stages to run, those that run where the submitter does, before the rest is submitted.

    UserError when this is a node of some job: that is what they were not meant for.
    """
    stages = config.cluster.on_login_node
    here = [planned for planned in plan if planned.action != "skip" and planned.stage in stages]
    if here and slurm.on_a_node():
        names = ",".join(planned.stage for planned in here)
        raise UserError(
            f"cluster.on_login_node: {names} cannot run on {os.environ['SLURMD_NODENAME']}, a node of job "
            f"{os.environ['SLURM_JOB_ID']}; run --stage {names} on a login node first"
        )
    return here, [planned for planned in plan if planned not in here]


def _same_devices(stage: str, stages: Sequence[str]) -> set[str]:
    """The trainings before `stage`: in one allocation they would have the same GPUs at the same time."""
    trainings = [name for name in ("sft", "reward-model", "train", "evaluate") if name in stages]
    return set(trainings[: trainings.index(stage)]) if stage in trainings else set()


def submit(
    run: RunDir,
    config: Config,
    plan: Sequence[Planned],
    forced: Sequence[str],
    executor_name: str | None = None,
    earlier: Submission | None = None,
) -> Submission:
    """Write the configuration and the submission, and hand its jobs to the executor: the profile's, or another one.
    It takes the place of an `earlier` one that it goes on with.

    The caller holds the run's lock and has made sure that no job of an earlier submission lives.
    """
    from pipeline.scheduler import allocation, executor

    submission = describe(earlier.id if earlier else new_id(), config, plan, forced, executor_name)
    if submission.executor == "allocation":
        here = allocation.surrounding()
        submission = replace(submission, allocation=here.job, restart=here.restart)
    record(run, config, plan, submission)
    return executor.submit_jobs(run, submission, config.cluster)


def new_id() -> str:
    """A submission's id."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"


def describe(
    submission_id: str,
    config: Config,
    plan: Sequence[Planned],
    forced: Sequence[str],
    executor_name: str | None = None,
) -> Submission:
    """What is to be submitted: no job has an id yet."""
    jobs = group_jobs(config, plan)
    return Submission(
        id=submission_id,
        executor=executor_name or config.cluster.executor,
        jobs=jobs,
        forced=tuple(forced),
        time=time.time(),
        service=[job.stages for job in jobs if "serve" in job.stages or "train" in job.stages] == [("serve",)],
    )


def record(run: RunDir, config: Config, plan: Sequence[Planned], submission: Submission) -> None:
    """Write all that a submission's jobs read, and that its stages wait for them; the caller holds the run's lock."""
    save_config(run, config)
    hashes = HashCache(run.root / "cache" / "hashes.json")
    provenance.write(run, config.cluster.trainer_image, image_digest(config, hashes))
    hashes.save()
    for each in plan:
        if each.mem_gb or each.time_min:
            needs.remember(run, each.stage, needs.Need(each.mem_gb, each.time_min, each.reason.rpartition(": ")[2]))
    for stage in TRAININGS:
        run.save_flag(stage).unlink(missing_ok=True)
    if not submissions.service_alive(run):
        endpoint.withdraw(run)  # of a job that was killed
    submissions.write(run, submission)
    for job in submission.jobs:
        for stage in job.stages:
            set_state(run, stage, submission.id, "pending")


def save_config(run: RunDir, config: Config) -> None:
    """Write config.yaml when it differs from what is there; the change goes to the events."""
    text = load.dump(config)
    old = run.config.read_text("utf-8") if run.config.exists() else None
    if text == old:
        return
    atomic.write_text(run.config, text)
    events.record(run, "configuration written" if old is None else "configuration changed")


def refuse_other_config(run: RunDir, config: Config) -> None:
    """While jobs live, the configuration that they read must stay: UserError when `config` is another."""
    if run.config.exists() and load.dump(config) != run.config.read_text("utf-8"):
        raise UserError(
            f"{run.root}: jobs of this run are alive and read another configuration; wait for them, "
            f"stop them with python -m pipeline.cancel {os.path.relpath(run.root)}, or choose another --run-dir"
        )


def _parents(config: Config, stage: str) -> tuple[str, ...]:
    definition = REGISTRY[stage]
    return (*definition.needs(config), *definition.after(config))
