"""The one place that hands jobs to submitit: child processes of this machine, or sbatch scripts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from pipeline import procs
from pipeline.config.cluster import Cluster
from pipeline.run import snapshot
from pipeline.run.directory import RunDir
from pipeline.scheduler import script
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.options import dependency, job_resources
from pipeline.scheduler.submission import Job, Submission
from pipeline.stages.job import VISIBLE_DEVICES, run_job

LEAKING = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "PMI_", "PMIX_", "SUBMITIT_")
"""Variables of a surrounding job that would change or break the jobs submitted from inside it."""


def submit_jobs(run: RunDir, submission: Submission, cluster: Cluster) -> Submission:
    """Submit the jobs in order and record each one's id as soon as it is known.

    It runs in a session of its own: jobs survive the submitter's end and a Ctrl-C in its terminal.
    """
    code = snapshot.take(run)
    procs.in_new_session(lambda: _submit_all(run, submission, cluster, code), run.root / "jobs" / "controllers.log")
    recorded = submissions.find(run, submission.id)
    assert recorded is not None
    return recorded


def _submit_all(run: RunDir, submission: Submission, cluster: Cluster, code: Path) -> None:
    local = submission.executor == "local"
    allocation = {key: value for key, value in os.environ.items() if key.startswith(LEAKING) and key != "SLURM_CONF"}
    for key in allocation:
        del os.environ[key]
    if local:
        # submitit's local executor overwrites CUDA_VISIBLE_DEVICES; the job puts it back.
        os.environ[VISIBLE_DEVICES] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
        os.chdir(run.root)  # a checkout that is the working directory would come before the code of the run
    for job in submission.jobs:
        if local:
            job_id = _start_local(run, submission, cluster, job)
            submitted = replace(job, job_id=job_id, process=procs.process_of(int(job_id)))
        else:
            job_id = script.submit(run, submission.id, cluster, job, code, depends_on(submission, job))
            submitted = replace(job, job_id=job_id)
        submission = submission.with_job(submitted)
        submissions.write(run, submission)


def _start_local(run: RunDir, submission: Submission, cluster: Cluster, job: Job) -> str:
    import submitit

    # A Slurm job marks its own children: the batch shell and srun above it must not be taken for them.
    os.environ |= {procs.RUN_MARK: str(run.root), procs.STAGE_MARK: job.name}
    executor = submitit.LocalExecutor(script.job_folder(run, submission.id, job))
    executor.update_parameters(timeout_min=job_resources(cluster, job).time_min)
    started = executor.submit(run_job, str(run.root), job.name, submission.id)
    return str(started.job_id)


def depends_on(submission: Submission, job: Job) -> str | None:
    """Slurm's dependency of a job on the jobs of this submission: stages that are done already have none."""

    def ids(stages: tuple[str, ...]) -> list[str]:
        jobs = (submission.job_of(stage) for stage in stages)
        return list(dict.fromkeys(one.job_id for one in jobs if one and one.job_id))

    return dependency(ids(job.waits_for), ids(job.beside))
