"""sbatch scripts: written and submitted by submitit, running a plain command, so that a person can submit one again.

submitit's own command loads a pickle that bears the job's id; a script with it runs once only.
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.cluster import Cluster
from pipeline.errors import UserError
from pipeline.run import bad_nodes
from pipeline.run.directory import RunDir
from pipeline.scheduler.options import (
    Where,
    leader_lines,
    retry_lines,
    setup_lines,
    slurm_options,
    srun_args,
    work_command,
)
from pipeline.scheduler.submission import Job, job_folder

if TYPE_CHECKING:
    import submitit


log = logging.getLogger("pipeline")

RETRY_S = (5.0, 10.0, 20.0, 40.0)
"""Seconds before sbatch is called again after a refusal that may pass."""
_FULL = re.compile(r"Max\w*Submit\w*|job submit limit")
"""sbatch's words for a user who may have no more jobs in the queue."""
_PASSING = re.compile(rf"{_FULL.pattern}|Unable to contact slurm controller|temporarily un(able|available)")
"""The same, or a controller that is away. Not a time-out: the job may have been accepted."""


def check_path(root: Path) -> None:
    """Refuse a run directory whose path an sbatch script cannot carry."""
    text = str(root)
    if "%" in text or "\\" in text:
        raise UserError(f"--run-dir {text!r}: Slurm gives % and \\ a meaning in paths; choose a path without it")
    if ":" in text:
        raise UserError(f"--run-dir {text!r}: PYTHONPATH ends a folder at each colon; choose a path without it")
    if not text.isprintable():
        raise UserError(f"--run-dir {text!r}: an sbatch script holds no control character; choose a path without it")


@dataclass(frozen=True)
class Target:
    """Whose job a script does: one run's or, task by task of a job array, that of several."""

    folder: Path
    """Where the script lies."""
    where: Where
    avoided: tuple[str, ...] = ()
    """Nodes that are known to be broken."""
    logs: Path | None = None
    """An array's folder of logs; %a in it is a task's number."""
    find: tuple[str, ...] = ()
    """An array's first shell lines: a task finds its run."""
    tasks: int = 0
    """How many an array has; 0: this is a job by itself."""
    at_once: int | None = None
    """How many of them may run at the same time."""

    @classmethod
    def of_run(cls, run: RunDir, submission: str, job: Job, code: Path) -> Target:
        """A run's own job."""
        bad = tuple(node.node for node in bad_nodes.known(run))
        return cls(job_folder(run, submission, job), Where.at(run.root, code), bad)


def render(run: RunDir, submission: str, cluster: Cluster, job: Job, code: Path, python: str = sys.executable) -> str:
    """The whole sbatch script of a run's job. Writes nothing."""
    return render_for(Target.of_run(run, submission, job, code), submission, cluster, job, python)


def render_for(target: Target, submission: str, cluster: Cluster, job: Job, python: str = sys.executable) -> str:
    """The same of any target."""
    executor = _executor(target, submission, cluster, job, python)
    text: str = executor._make_submission_file_text(work_command(python, target.where, job, submission), "")
    return text


def submit(target: Target, submission: str, cluster: Cluster, job: Job, depends: str | None, held: bool = False) -> str:
    """Submit a job, or an array of jobs; returns its id. UserError with sbatch's own words when it refuses, again and
    again where that may help.

    Dependency and hold are given on sbatch's command line, not in the script: jobs that are over cannot be depended on
    when the script is submitted again.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            f"cluster.executor: slurm, but there is no sbatch on PATH (profile {cluster.name}); "
            "submit on a login node, or use --cluster local"
        )
    executor = _executor(target, submission, cluster, job, sys.executable)
    executor.depends, executor.held = depends, held
    target.folder.mkdir(parents=True, exist_ok=True)
    command = work_command(sys.executable, target.where, job, submission)
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
        for link in target.folder.glob(".submission_file_*"):
            link.unlink()
    raise AssertionError("the last attempt returns or raises")


def queue_full(error: UserError) -> bool:
    """Whether the user could have no more jobs in the queue, though sbatch was called again and again."""
    return _FULL.search(str(error)) is not None


def _sbatch_words(error: BaseException) -> str:
    text = f"{error}\n{error.__cause__ or ''}"
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s*sbatch: ", line)]
    return "; ".join(dict.fromkeys(lines)) or " ".join(str(error).split())


def _executor(target: Target, submission: str, cluster: Cluster, job: Job, python: str) -> Any:
    executor = _executor_class()(target.folder)
    bad = [node for node in target.avoided if node not in cluster.exclude]
    options = slurm_options(cluster.model_copy(update={"exclude": (*cluster.exclude, *bad)}), job)
    name, minutes = options.pop("job-name"), options.pop("time")
    executor.update_parameters(
        job_name=name,
        time=minutes,
        additional_parameters=options,
        setup=[
            *target.find,
            *retry_lines(cluster, python, target.where, job, submission),
            *setup_lines(cluster, target.where),
            *leader_lines(cluster, target.where, job),
        ],
        srun_args=srun_args(cluster, job),
    )
    if target.tasks:
        executor.logs = target.logs
        executor.parameters |= {"map_count": target.tasks, "array_parallelism": target.at_once or target.tasks}
    return executor


@cache
def _executor_class() -> type[submitit.SlurmExecutor]:
    import submitit
    from submitit.slurm import slurm

    class ScriptExecutor(submitit.SlurmExecutor):  # type: ignore[misc]
        """submitit's Slurm executor, for a plain command, and with the dependency beside the script."""

        depends: str | None = None
        held = False
        logs: Path | None = None

        @classmethod
        def affinity(cls) -> int:
            return 2  # a dry run needs no Slurm

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            folder = self.logs or self.folder
            text: str = slurm._make_sbatch_string(command=command, folder=folder, **self.parameters)
            text = text.replace("#SBATCH --wckey=submitit\n", "")  # some sites accept only keys that they know
            first, rest = text.split("\n", 1)
            again = (
                "this job again by hand: sbatch" if self.logs is None else "a task again by hand: sbatch --array=TASK"
            )
            return f"{first}\n# Written by pipeline.submit. To run {again} THIS_FILE\n{rest}"

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            waits = [f"--dependency={self.depends}"] if self.depends else []
            return ["sbatch", *waits, *(["--hold"] if self.held else []), str(submission_file_path)]

    return ScriptExecutor
