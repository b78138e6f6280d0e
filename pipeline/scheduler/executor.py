"""The one place that talks to submitit: from planned jobs to submitted ones."""

from __future__ import annotations

import os
import shlex
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


_PLACE = ("account", "partition", "qos", "reservation", "constraint")
"""Fields of a profile that are sbatch options of the same name."""


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
        **{key: value for key in _PLACE if (value := getattr(cluster, key))},
        **_slurm_resources(cluster, _most([cluster.resources(stage) for stage in job.stages])),
        "kill-on-invalid-dep": "yes",
        "signal": f"USR2@{cluster.grace_s}",
        ("requeue" if cluster.requeue else "no-requeue"): True,
    }
    return {**options, **cluster.extra}


def _submit_all(run: RunDir, submission: Submission, cluster: Cluster) -> None:
    for key in [key for key in os.environ if key.startswith(_LEAKING) and key != "SLURM_CONF"]:
        del os.environ[key]
    local = submission.executor == "local"
    for job in submission.jobs:
        if local:  # a Slurm job marks its own children: the batch shell and srun above it must not be taken for them
            os.environ |= {procs.RUN_MARK: str(run.root), procs.STAGE_MARK: job.name}
        executor = _executor(run, submission, cluster, job)
        submitted = executor.submit(run_job, str(run.root), job.name, submission.id)
        process = procs.process_of(int(submitted.job_id)) if local else None
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
    exports = [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
    executor.update_parameters(
        slurm_additional_parameters=options,
        slurm_setup=[*cluster.setup, *exports] or None,
        # Since Slurm 22.05 srun no longer takes the job's CPUs by itself.
        slurm_srun_args=[f"--cpus-per-task={most.cpus}", *cluster.srun_args],
    )
    return executor


def _parents(submission: Submission, job: Job) -> list[str]:
    """Ids of the jobs of this submission that run what `job` waits for."""
    jobs = (submission.job_of(stage) for stage in job.waits_for)
    return list(dict.fromkeys(parent.job_id for parent in jobs if parent and parent.job_id))


def _most(resources: Sequence[Resources]) -> Resources:
    return Resources(**{name: max(getattr(each, name) for each in resources) for name in Resources.model_fields})


def _slurm_resources(cluster: Cluster, resources: Resources) -> dict[str, Any]:
    options: dict[str, Any] = {
        "time": resources.time_min,
        "nodes": resources.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": resources.cpus,
    }
    if cluster.memory_request == "mem":
        options["mem"] = f"{resources.mem_gb}G"
    elif cluster.memory_request == "mem-per-cpu":
        options["mem-per-cpu"] = f"{-(-resources.mem_gb * 1024 // resources.cpus)}M"
    if resources.gpus:
        count = resources.gpus * (resources.nodes if cluster.gpu_request == "gpus" else 1)
        typed = f"{cluster.gpu_type}:{count}" if cluster.gpu_type else str(count)
        options[cluster.gpu_request] = f"gpu:{typed}" if cluster.gpu_request == "gres" else typed
    return options
