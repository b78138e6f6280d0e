"""submission.json: the jobs of the latest submission, and whether they still live.

Plain files only: reading a run's state needs neither submitit nor the configuration.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline import procs
from pipeline.errors import UserError
from pipeline.run import atomic
from pipeline.run.build_cache import exclusive
from pipeline.run.directory import RunDir
from pipeline.scheduler import queue
from pipeline.scheduler.queue import Queued

JOBS = "jobs"
"""The folder in the run directory with one folder a job: its script and logs."""
SUBMITTING_S = 180.0
"""A job without an id so long after its submission was never submitted; a refused sbatch is tried again meanwhile."""
SLURM_S = 10.0
"""Seconds between questions to Slurm's controller, which a whole cluster asks."""
_asked: dict[tuple[str, ...], tuple[float, dict[str, Queued]]] = {}
_runs: dict[tuple[str, int], tuple[float, bool]] = {}


@dataclass(frozen=True)
class Job:
    """One submitted job: the stages that run in it, in order, and the stages that it waits for."""

    stages: tuple[str, ...]
    waits_for: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    """Stages that must have started: a server, which never ends well."""
    job_id: str | None = None
    """None until the executor has answered: a crash in between leaves this as evidence."""
    process: procs.ProcessId | None = None
    """The job's controller, for local jobs."""
    mem_gb: int = 0
    """What earlier jobs of its stages turned out to need, where that is more than the profile says; 0: nothing."""
    time_min: int = 0
    """The same of the time limit."""
    by_hand: float = 0.0
    """When a person's own sbatch of its script took the place of an earlier job (time.time()); 0: never."""

    @property
    def name(self) -> str:
        return "+".join(self.stages)


@dataclass(frozen=True)
class Submission:
    """One call of the submitter that had something to run."""

    id: str
    executor: str
    jobs: tuple[Job, ...]
    forced: tuple[str, ...] = ()
    time: float = 0.0
    service: bool = False
    """Whether a server runs on its own in it, outside a training's job. Such a submission has a record of its own,
    so that trainings can be submitted while the server goes on."""

    allocation: str | None = None
    """Id of the Slurm job that the jobs are processes in; its node is not this one, as a rule."""
    restart: int = 0
    """How often that Slurm job had been requeued: a later start of it has none of these processes."""
    array: str | None = None
    """Folder with the scripts of its jobs, where these are tasks of job arrays (pipeline/scheduler/arrays.py)."""
    task: int = 0
    """Their number in each of the arrays."""

    def job_of(self, stage: str) -> Job | None:
        """The job that runs `stage`, or None."""
        return next((job for job in self.jobs if stage in job.stages), None)

    def with_job(self, job: Job) -> Submission:
        """The submission with the job of the same name replaced."""
        return replace(self, jobs=tuple(job if old.name == job.name else old for old in self.jobs))


def job_folder(run: RunDir, submission: str, job: Job) -> Path:
    """Where a job's script and logs are."""
    return run.root / JOBS / f"{submission}-{job.name}"


def job_log(run: RunDir, submission: Submission, job: Job) -> Path:
    """What the job, its script, and Slurm about it, wrote to stderr."""
    name = "0_log.err" if submission.executor == "allocation" else f"{job.job_id}_0_log.err"
    return job_folder(run, submission.id, job) / name


def write(run: RunDir, submission: Submission) -> None:
    """Record the submission."""
    atomic.write_json(_path(run, submission.service), asdict(submission))


def find(run: RunDir, submission_id: str) -> Submission | None:
    """The recorded submission with this id, or None when another has taken its place."""
    for service in (False, True):
        submission = read(run, service)
        if submission is not None and submission.id == submission_id:
            return submission
    return None


def read(run: RunDir, service: bool = False) -> Submission | None:
    """The latest submission, or the latest with a server on its own; None when there was none."""
    raw = atomic.read_json(_path(run, service))
    if raw is None:
        return None
    jobs = []
    for job in raw.pop("jobs"):
        process = job.pop("process")
        stages, waits_for, beside = (tuple(job.pop(name, ())) for name in ("stages", "waits_for", "beside"))
        jobs.append(Job(stages, waits_for, beside, process=procs.ProcessId(**process) if process else None, **job))
    raw["forced"] = tuple(raw["forced"])
    return Submission(jobs=tuple(jobs), **raw)


def still_forced(run: RunDir, forced: Sequence[str], submission: Submission | None) -> tuple[str, ...]:
    """The stages that --force has still to redo: a job, or an allocation, may start again after it has done some."""
    done = [stage for stage in forced if submission and _done_by(run, stage) == submission.id]
    return tuple(stage for stage in forced if stage not in done)


def _done_by(run: RunDir, stage: str) -> str:
    outputs = run.outputs(stage)
    return outputs.submission if outputs else ""


def busy(run: RunDir) -> Submission | None:
    """The submission that still works on the run's stages, or None. A server on its own does not count."""
    for service in (False, True):
        submission = read(run, service)
        if submission is not None and any(job.stages != ("serve",) for job in live_jobs(submission)):
            return submission
    return None


def job_alive(submission: Submission, job: Job) -> bool:
    """Whether the job is waiting or running."""
    if submission.executor == "slurm":
        return job.job_id is not None and job.job_id in _slurm_jobs(submission)
    if job.process is None or not job.process.alive():
        return False
    return job.process.here or submission.allocation is None or _allocation_runs(submission)


def live_jobs(submission: Submission | None) -> list[Job]:
    """The submission's jobs that are waiting or running."""
    if submission is None:
        return []
    return [job for job in submission.jobs if job_alive(submission, job)]


def queued(submission: Submission, job: Job) -> Queued | None:
    """What Slurm says of a job in its queue; None for a job that is over, or no job of Slurm's."""
    return _slurm_jobs(submission).get(job.job_id or "") if submission.executor == "slurm" else None


def with_orphans(submission: Submission) -> Submission:
    """The submission with the ids of jobs that were queued though their submitter ended before it could record them.

    A job is known by its script, which lies in a folder named by the submission. UserError when Slurm does not answer.
    """
    if submission.executor != "slurm" or all(job.job_id for job in submission.jobs):
        return submission
    scripts = queue.own_scripts()
    for job in submission.jobs:
        ids = _with_script_of(submission, job, scripts)
        if job.job_id is None and ids:
            submission = submission.with_job(replace(job, job_id=max(ids, key=lambda job_id: int(array_of(job_id)))))
    return submission


def waits_by_script(submission: Submission, job: Job) -> bool:
    """Whether Slurm's queue holds the job's script, whatever job that is; also where Slurm does not answer."""
    try:
        return bool(_with_script_of(submission, job, queue.own_scripts()))
    except UserError:
        return True


def _with_script_of(submission: Submission, job: Job, scripts: Sequence[tuple[str, str]]) -> list[str]:
    folder = f"/{JOBS}/{submission.id}-{job.name}/" if submission.array is None else f"{submission.array}/{job.name}/"
    task = "" if submission.array is None else f"_{submission.task}"
    return [job_id for job_id, script in scripts if folder in script and re.fullmatch(rf"\d+{task}", job_id)]


def array_of(job_id: str) -> str:
    """The array that a task is in; of a job by itself its own id. The larger, the later was it submitted."""
    return job_id.partition("_")[0]


def adopt(run: RunDir, submission: Submission, job: Job, job_id: str) -> Submission:
    """Record that `job_id` does the job now; other jobs of the submission may begin, and do the same, at this moment.

    A job that had another id was submitted again by a person, who may do that with those beside it too.
    """
    by_hand = time.time() if job.job_id is not None else job.by_hand
    with exclusive(run.root / "control" / "adopt.lock", f"recording job {job_id}"):
        latest = find(run, submission.id)
        if latest is None:
            raise UserError(f"{run.root}: this job belongs to submission {submission.id}, which was replaced")
        latest = latest.with_job(replace(job, job_id=job_id, by_hand=by_hand))
        write(run, latest)
    return latest


def recover(run: RunDir) -> None:
    """Record such jobs, so that nothing is submitted a second time and a cancellation reaches them."""
    for service in (False, True):
        submission = read(run, service)
        if submission is not None and (whole := with_orphans(submission)) != submission:
            write(run, whole)


def _slurm_jobs(submission: Submission) -> dict[str, Queued]:
    """The submission's jobs in the queue; asked for all at once, and not more often than every SLURM_S seconds."""
    ids = tuple(job.job_id for job in submission.jobs if job.job_id)
    known = _asked.get(ids)
    if known is None or time.monotonic() - known[0] > SLURM_S:
        known = _asked[ids] = (time.monotonic(), queue.ask(ids))
    return known[1]


def _allocation_runs(submission: Submission) -> bool:
    """Whether the submission's allocation runs still, in the very start that its processes belong to."""
    start = (submission.allocation or "", submission.restart)
    known = _runs.get(start)
    if known is None or time.monotonic() - known[0] > SLURM_S:
        known = _runs[start] = (time.monotonic(), queue.runs(*start))
    return known[1]


def service_alive(run: RunDir) -> bool:
    """Whether a server that runs on its own (a `--stage serve` job) is alive."""
    submission = read(run, service=True)
    job = submission.job_of("serve") if submission else None
    return submission is not None and job is not None and job_alive(submission, job)


def _path(run: RunDir, service: bool) -> Path:
    return run.root / "services" / "submission.json" if service else run.root / "submission.json"
