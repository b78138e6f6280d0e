"""The one place that talks to submitit: from planned jobs to submitted ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline import procs
from pipeline.config.cluster import Cluster, Resources
from pipeline.run.directory import RunDir
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.submission import Job, Submission
from pipeline.stages.job import VISIBLE_DEVICES, run_job

if TYPE_CHECKING:
    import submitit

_LEAKING = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "PMI_", "PMIX_", "SUBMITIT_")
"""Variables of a surrounding job that would change or break the jobs submitted from inside it."""


def submit_jobs(run: RunDir, submission: Submission, cluster: Cluster) -> Submission:
    """Submit the jobs in order and record each one's id as soon as it is known.

    It runs in a session of its own: jobs survive the submitter's end and a Ctrl-C in its terminal.
    """
    procs.in_new_session(lambda: _submit_all(run, submission, cluster), run.root / "jobs" / "controllers.log")
    recorded = submissions.find(run, submission.id)
    assert recorded is not None
    return recorded


def slurm_options(cluster: Cluster, job: Job) -> dict[str, Any]:
    """The sbatch options of a job, without its dependencies: the most that any of its stages asks for."""
    options: dict[str, Any] = {
        "job-name": f"hh-{job.name}",
        **{key: value for key in ("account", "partition", "qos", "constraint") if (value := getattr(cluster, key))},
        **_slurm_resources(_most([cluster.resources(stage) for stage in job.stages])),
        "kill-on-invalid-dep": "yes",
    }
    return {**options, **cluster.extra}


def _submit_all(run: RunDir, submission: Submission, cluster: Cluster) -> None:
    for key in [key for key in os.environ if key.startswith(_LEAKING) and key != "SLURM_CONF"]:
        del os.environ[key]
    os.environ[procs.RUN_MARK] = str(run.root)
    for job in submission.jobs:
        os.environ[procs.STAGE_MARK] = job.name
        executor = _executor(run, submission, cluster, job)
        submitted = executor.submit(run_job, str(run.root), job.name, submission.id)
        process = procs.process_of(int(submitted.job_id)) if submission.executor == "local" else None
        submission = submission.with_job(replace(job, job_id=submitted.job_id, process=process))
        submissions.write(run, submission)


def _executor(run: RunDir, submission: Submission, cluster: Cluster, job: Job) -> submitit.Executor:
    import submitit

    folder = run.root / "jobs" / f"{submission.id}-{job.name}"
    executor = submitit.AutoExecutor(folder, cluster=submission.executor)
    most = _most([cluster.resources(stage) for stage in job.stages])
    executor.update_parameters(name=f"hh-{job.name}", timeout_min=most.time_min)
    if submission.executor == "local":
        # submitit's local executor overwrites CUDA_VISIBLE_DEVICES; the job puts it back.
        os.environ[VISIBLE_DEVICES] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return executor
    options = slurm_options(cluster, job)
    del options["job-name"], options["time"]
    parents = _parents(submission, job)
    if parents:
        options["dependency"] = "afterok:" + ":".join(parents)
    executor.update_parameters(slurm_additional_parameters=options, slurm_setup=list(cluster.setup) or None)
    return executor


def _parents(submission: Submission, job: Job) -> list[str]:
    """Ids of the jobs of this submission that run what `job` waits for."""
    jobs = (submission.job_of(stage) for stage in job.waits_for)
    return list(dict.fromkeys(parent.job_id for parent in jobs if parent and parent.job_id))


def _most(resources: Sequence[Resources]) -> Resources:
    return Resources(**{name: max(getattr(each, name) for each in resources) for name in Resources.model_fields})


def _slurm_resources(resources: Resources) -> dict[str, Any]:
    options: dict[str, Any] = {
        "time": resources.time_min,
        "nodes": resources.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": resources.cpus,
        "mem": f"{resources.mem_gb}G",
    }
    if resources.gpus:
        options["gpus-per-node"] = resources.gpus
    return options
