"""The one place that hands jobs to submitit: child processes of this machine, or sbatch scripts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline import procs
from pipeline.config.cluster import Cluster
from pipeline.errors import UserError
from pipeline.run import snapshot
from pipeline.run.directory import RunDir
from pipeline.scheduler import allocation, script, slurm
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.options import dependency, job_resources
from pipeline.scheduler.state import set_state
from pipeline.scheduler.submission import Job, Submission
from pipeline.stages.job import VISIBLE_DEVICES, run_job

_LEAKING = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "PMI_", "PMIX_", "SUBMITIT_", "HH_PIPELINE_")
"""Beginnings of variables of a surrounding job, or of a run, that would change or break the jobs submitted inside."""
_KEPT = ("SLURM_CONF", "HH_PIPELINE_HOME")
"""Variables with such names that are people's own."""
_DEVICES = (
    *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"),
    *("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ZE_AFFINITY_MASK"),
)
"""Which GPUs Slurm gave to a job; it sets them anew only in jobs that ask for some."""
_TEMPORARY = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")


def passed_on(environ: Mapping[str, str], here: bool = False) -> dict[str, str]:
    """What jobs inherit of the submitter's environment.

    Of a surrounding Slurm job they inherit neither settings, nor GPUs, nor a temporary folder that ends with it;
    those that run `here`, on this node, have its GPUs and folder.
    """
    kept = {key: value for key, value in environ.items() if not key.startswith(_LEAKING) or key in _KEPT}
    if here or "SLURM_JOB_ID" not in environ:
        return kept
    of_job = {key for key in _TEMPORARY if key in kept and _belongs_to_job(kept[key], environ)}
    return {key: value for key, value in kept.items() if key not in of_job and key not in _DEVICES}


def _belongs_to_job(folder: str, environ: Mapping[str, str]) -> bool:
    """Whether a folder bears the surrounding job's id, or is named by one of the job's own variables."""
    named = any(value == folder for key, value in environ.items() if key.startswith("SLURM_"))
    return named or re.search(rf"(?<!\d){re.escape(environ['SLURM_JOB_ID'])}(?!\d)", folder) is not None


def submit_jobs(run: RunDir, submission: Submission, cluster: Cluster) -> Submission:
    """Submit the jobs in order and record each one's id as soon as it is known: all of them, or none.

    It runs in a session of its own: jobs survive the submitter's end and a Ctrl-C in its terminal. Only those inside
    an allocation are the submitter's children.
    """
    code = snapshot.take(run)
    if submission.executor == "allocation":
        return allocation.start_jobs(run, submission, cluster, code)
    procs.in_new_session(lambda: _submit_all(run, submission, cluster, code), run.root / "jobs" / "controllers.log")
    recorded = submissions.find(run, submission.id)
    assert recorded is not None
    return recorded


def leave_surroundings(here: bool = False) -> None:
    """Drop from this process's environment what its jobs must not inherit."""
    for key in os.environ.keys() - passed_on(os.environ, here).keys():
        del os.environ[key]


def _submit_all(run: RunDir, submission: Submission, cluster: Cluster, code: Path) -> None:
    local = submission.executor == "local"
    leave_surroundings(here=local)
    if local:
        # submitit's local executor overwrites CUDA_VISIBLE_DEVICES; the job puts it back.
        os.environ[VISIBLE_DEVICES] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
        os.chdir(run.root)  # a checkout that is the working directory would come before the code of the run
    try:
        for job in submission.jobs:
            if local:
                job_id = _start_local(run, submission, cluster, job)
                submitted = replace(job, job_id=job_id, process=procs.process_of(int(job_id)))
            else:
                target = script.Target.of_run(run, submission.id, job, code)
                job_id = script.submit(target, submission.id, cluster, job, depends_on(submission, job))
                submitted = replace(job, job_id=job_id)
            submission = submission.with_job(submitted)
            submissions.write(run, submission)
    except BaseException as error:
        try:
            _take_back(run, submission, error)
        except UserError as more:
            raise UserError(f"{error}; its other jobs are in the queue still: {more}") from error
        raise


def _take_back(run: RunDir, submission: Submission, error: BaseException) -> None:
    """End the jobs of a submission that did not get through: without the others, they would work for nothing."""
    submitted = [job for job in submission.jobs if job.job_id is not None]
    for job in reversed(submitted):  # a waiting one must not take its parent's end for a reason to start
        if job.process is not None:
            procs.terminate(job.process)
    if submission.executor == "slurm":
        slurm.cancel([job.job_id for job in submitted if job.job_id])
    record_taken_back(run, submission, error)


def record_taken_back(run: RunDir, submission: Submission, error: BaseException) -> None:
    """Record that the jobs of a submission were ended because not all of them got through."""
    reason = f"not all jobs could be submitted: {str(error) or 'interrupted'}"
    for job in submission.jobs:
        for stage in job.stages:
            set_state(run, stage, submission.id, "cancelled", reason)


def _start_local(run: RunDir, submission: Submission, cluster: Cluster, job: Job) -> str:
    import submitit

    # A Slurm job marks its own children: the batch shell and srun above it must not be taken for them.
    os.environ |= {procs.RUN_MARK: str(run.root), procs.STAGE_MARK: job.name}
    executor = submitit.LocalExecutor(submissions.job_folder(run, submission.id, job))
    executor.update_parameters(timeout_min=job_resources(cluster, job).time_min)
    started = executor.submit(run_job, str(run.root), job.name, submission.id)
    return str(started.job_id)


def depends_on(submission: Submission, job: Job) -> str | None:
    """Slurm's dependency of a job on the jobs of this submission: stages that are done already have none."""
    return dependency(_ids(submission, job.waits_for), _ids(submission, job.beside))


def corresponds_to(submission: Submission, job: Job) -> str | None:
    """The dependency of a whole array on those before it: each task waits for that of the same number. Of `after`, as
    for a server, Slurm knows no such form."""
    return dependency([submissions.array_of(task) for task in _ids(submission, job.waits_for)], (), "aftercorr")


def _ids(submission: Submission, stages: Sequence[str]) -> list[str]:
    jobs = (submission.job_of(stage) for stage in stages)
    return list(dict.fromkeys(one.job_id for one in jobs if one and one.job_id))
