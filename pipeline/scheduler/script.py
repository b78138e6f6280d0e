"""sbatch scripts: written and submitted by submitit, running a plain command, so that a person can submit one again.

submitit's own command loads a pickle that bears the job's id; a script with it runs once only.
"""

from __future__ import annotations

import re
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.cluster import Cluster
from pipeline.errors import UserError
from pipeline.run import bad_nodes
from pipeline.run.directory import RunDir
from pipeline.scheduler.options import retry_lines, setup_lines, slurm_options, srun_args, work_command
from pipeline.scheduler.submission import Job

if TYPE_CHECKING:
    import submitit


def job_folder(run: RunDir, submission: str, job: Job) -> Path:
    """Where a job's script and logs are."""
    return run.root / "jobs" / f"{submission}-{job.name}"


def render(run: RunDir, submission: str, cluster: Cluster, job: Job, code: Path) -> str:
    """The whole sbatch script of a job. Writes nothing."""
    executor = _executor(run, submission, cluster, job, code)
    command = work_command(sys.executable, run.root, job, submission)
    text: str = executor._make_submission_file_text(command, "")
    return text


def submit(run: RunDir, submission: str, cluster: Cluster, job: Job, code: Path, depends: str | None) -> str:
    """Submit a job; returns its id. UserError with sbatch's own words when it refuses.

    The dependency is given on sbatch's command line, not in the script: jobs that are over cannot be depended on when
    the script is submitted again.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            f"cluster.executor: slurm, but there is no sbatch on PATH (profile {cluster.name}); "
            "submit on a login node, or use --cluster local"
        )
    folder = job_folder(run, submission, job)
    executor = _executor(run, submission, cluster, job, code)
    executor.depends = depends
    folder.mkdir(parents=True, exist_ok=True)
    try:
        submitted = executor._submit_command(work_command(sys.executable, run.root, job, submission))
    except Exception as error:  # submitit wraps what sbatch wrote in errors of several types
        if "sbatch" not in f"{error}{error.__cause__}":
            raise
        raise UserError(f"job {job.name}: {_sbatch_words(error)} (cluster profile {cluster.name})") from error
    for link in folder.glob(".submission_file_*"):  # submitit leaves a link beside the script that bears the job's id
        link.unlink()
    return str(submitted.job_id)


def _sbatch_words(error: BaseException) -> str:
    text = f"{error}\n{error.__cause__ or ''}"
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s*sbatch: ", line)]
    return "; ".join(dict.fromkeys(lines)) or " ".join(str(error).split())


def _executor(run: RunDir, submission: str, cluster: Cluster, job: Job, code: Path) -> Any:
    executor = _executor_class()(job_folder(run, submission, job))
    bad = [node.node for node in bad_nodes.known(run) if node.node not in cluster.exclude]
    options = slurm_options(cluster.model_copy(update={"exclude": (*cluster.exclude, *bad)}), job)
    name, minutes = options.pop("job-name"), options.pop("time")
    executor.update_parameters(
        job_name=name,
        time=minutes,
        additional_parameters=options,
        setup=[
            *retry_lines(cluster, sys.executable, run.root, code, job, submission),
            *setup_lines(cluster, run.root, code),
        ],
        srun_args=srun_args(cluster, job),
    )
    return executor


@cache
def _executor_class() -> type[submitit.SlurmExecutor]:
    import submitit

    class ScriptExecutor(submitit.SlurmExecutor):  # type: ignore[misc]
        """submitit's Slurm executor, for a plain command, and with the dependency beside the script."""

        depends: str | None = None

        @classmethod
        def affinity(cls) -> int:
            return 2  # a dry run needs no Slurm

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            text: str = super()._make_submission_file_text(command, uid)
            text = text.replace("#SBATCH --wckey=submitit\n", "")  # some sites accept only keys that they know
            first, rest = text.split("\n", 1)
            return f"{first}\n# Written by pipeline.submit. To run this job again by hand: sbatch THIS_FILE\n{rest}"

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            waits = [f"--dependency={self.depends}"] if self.depends else []
            return ["sbatch", *waits, str(submission_file_path)]

    return ScriptExecutor
