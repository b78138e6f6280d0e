"""sbatch scripts: written and submitted by submitit, running a plain command, so that a person can submit one again.

submitit's own command loads a pickle that bears the job's id; a script with it runs once only.
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.cluster import Cluster
from pipeline.errors import UserError
from pipeline.run import bad_nodes
from pipeline.run.directory import RunDir
from pipeline.scheduler.options import leader_lines, retry_lines, setup_lines, slurm_options, srun_args, work_command
from pipeline.scheduler.submission import Job, job_folder

if TYPE_CHECKING:
    import submitit


log = logging.getLogger("pipeline")

RETRY_S = (5.0, 10.0, 20.0, 40.0)
"""Seconds before sbatch is called again after a refusal that may pass."""
_PASSING = re.compile(
    r"Max\w*Submit\w*|job submit limit|Unable to contact slurm controller|temporarily un(able|available)"
)
"""sbatch's words for a full queue, or a controller that is away. Not a time-out: the job may have been accepted."""


def check_path(root: Path) -> None:
    """Refuse a run directory whose path an sbatch script cannot carry."""
    text = str(root)
    if "%" in text or "\\" in text:
        raise UserError(f"--run-dir {text!r}: Slurm gives % and \\ a meaning in paths; choose a path without it")
    if ":" in text:
        raise UserError(f"--run-dir {text!r}: PYTHONPATH ends a folder at each colon; choose a path without it")
    if not text.isprintable():
        raise UserError(f"--run-dir {text!r}: an sbatch script holds no control character; choose a path without it")


def render(run: RunDir, submission: str, cluster: Cluster, job: Job, code: Path, python: str = sys.executable) -> str:
    """The whole sbatch script of a job. Writes nothing."""
    executor = _executor(run, submission, cluster, job, code, python)
    command = work_command(python, run.root, job, submission)
    text: str = executor._make_submission_file_text(command, "")
    return text


def submit(run: RunDir, submission: str, cluster: Cluster, job: Job, code: Path, depends: str | None) -> str:
    """Submit a job; returns its id. UserError with sbatch's own words when it refuses, again and again where that
    may help.

    The dependency is given on sbatch's command line, not in the script: jobs that are over cannot be depended on when
    the script is submitted again.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            f"cluster.executor: slurm, but there is no sbatch on PATH (profile {cluster.name}); "
            "submit on a login node, or use --cluster local"
        )
    folder = job_folder(run, submission, job)
    executor = _executor(run, submission, cluster, job, code, sys.executable)
    executor.depends = depends
    folder.mkdir(parents=True, exist_ok=True)
    command = work_command(sys.executable, run.root, job, submission)
    try:
        for wait_s in (*RETRY_S, None):
            try:
                return str(executor._submit_command(command).job_id)
            except Exception as error:  # submitit wraps what sbatch wrote in errors of several types
                if "sbatch" not in f"{error}{error.__cause__}":
                    raise
                words = _sbatch_words(error)
                if wait_s is None or not _PASSING.search(words):
                    raise UserError(f"job {job.name}: {words} (cluster profile {cluster.name})") from error
                log.info("%s: %s; tried again in %.0f s", job.name, words, wait_s)
                time.sleep(wait_s)
    finally:
        # submitit leaves the script under this name too, beside the one that bears the job's id.
        for link in folder.glob(".submission_file_*"):
            link.unlink()
    raise AssertionError("the last attempt returns or raises")


def _sbatch_words(error: BaseException) -> str:
    text = f"{error}\n{error.__cause__ or ''}"
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s*sbatch: ", line)]
    return "; ".join(dict.fromkeys(lines)) or " ".join(str(error).split())


def _executor(run: RunDir, submission: str, cluster: Cluster, job: Job, code: Path, python: str) -> Any:
    executor = _executor_class()(job_folder(run, submission, job))
    bad = [node.node for node in bad_nodes.known(run) if node.node not in cluster.exclude]
    options = slurm_options(cluster.model_copy(update={"exclude": (*cluster.exclude, *bad)}), job)
    name, minutes = options.pop("job-name"), options.pop("time")
    executor.update_parameters(
        job_name=name,
        time=minutes,
        additional_parameters=options,
        setup=[
            *retry_lines(cluster, python, run.root, code, job, submission),
            *setup_lines(cluster, run.root, code),
            *leader_lines(cluster, run.root, job),
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
