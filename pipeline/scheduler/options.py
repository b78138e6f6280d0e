"""What a job asks Slurm for, and the shell lines before its work: pure functions of the cluster profile."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.cluster import Cluster, Resources
from pipeline.scheduler.submission import Job
from pipeline.stages.faults import LOG_MARK
from pipeline.stages.nodes import DONE, folder_of

_PLACE = ("account", "partition", "qos", "reservation", "constraint")
"""Fields of a profile that are sbatch options of the same name."""


@dataclass(frozen=True)
class Where:
    """A job's run directory and code, as words of its shell: each task of an array has its own."""

    run: str
    code: str

    @classmethod
    def at(cls, run_root: Path, code: Path) -> Where:
        """Of a job whose run directory is known."""
        return cls(shlex.quote(str(run_root)), shlex.quote(str(code)))


def slurm_options(cluster: Cluster, job: Job) -> dict[str, Any]:
    """The sbatch options of a job, without its dependencies: the most that any of its stages asks for."""
    options: dict[str, Any] = {
        "job-name": f"hh-{job.name}",
        **{key: value for key in _PLACE if (value := getattr(cluster, key))},
        **({"exclude": ",".join(cluster.exclude)} if cluster.exclude else {}),
        **_slurm_resources(cluster, job_resources(cluster, job)),
        "kill-on-invalid-dep": "yes",
        "signal": f"USR2@{cluster.grace_s}",
        ("requeue" if cluster.requeue else "no-requeue"): True,
    }
    # `extra` wins; false takes an option away.
    return {name: value for name, value in {**options, **cluster.extra}.items() if value is not False}


def job_resources(cluster: Cluster, job: Job) -> Resources:
    """The most of each resource that any stage of the job asks for."""
    each = [cluster.resources(stage) for stage in job.stages]
    asked = {name: max(getattr(one, name) for one in each) for name in Resources.model_fields}
    grown = {"mem_gb": job.mem_gb, "time_min": job.time_min}
    return Resources(**{name: max(value, grown.get(name, 0)) for name, value in asked.items()})


def srun_args(cluster: Cluster, job: Job) -> list[str]:
    """Options of the srun that starts the job's work, one task on each of its nodes."""
    resources = job_resources(cluster, job)
    # Since Slurm 22.05 srun no longer takes the job's CPUs by itself.
    arguments = [f"--cpus-per-task={resources.cpus}", *cluster.srun_args]
    if resources.nodes > 1:  # the first task decides how the job ends; the others follow it
        arguments += ["--wait=0", "--kill-on-bad-exit=0"]
    return arguments


def leader_lines(cluster: Cluster, where: Where, job: Job) -> list[str]:
    """Shell lines for a job of several nodes: it ends well when its first task has, though srun ends as the worst."""
    if job_resources(cluster, job).nodes == 1:
        return []
    done = f"{where.run}/{folder_of(Path(), '')}$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}/{DONE}"
    return [
        "srun() {",
        '    command srun "$@" && return',
        "    status=$?",
        f'    [ -e {done} ] || return "$status"',
        "}",
    ]


def setup_lines(cluster: Cluster, where: Where) -> list[str]:
    """Shell lines before a job's work. A module that is not there ends the job: its work would miss something."""
    lines = []
    for module in cluster.modules:
        name = shlex.quote(module)
        lines.append(f"module load {name} || {{ echo 'error: module load '{name}' failed' >&2; exit 1; }}")
    lines += cluster.setup
    variables = dict(cluster.environment)
    if cluster.interface:
        variables = {"NCCL_SOCKET_IFNAME": cluster.interface, "GLOO_SOCKET_IFNAME": cluster.interface} | variables
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    if cluster.scratch:  # in double quotes: the node knows what $SLURM_TMPDIR is
        test = 'mkdir -p "$TMPDIR" && [ -w "$TMPDIR" ]'
        unusable = 'echo "error: $TMPDIR: this scratch folder cannot be used" >&2; exit 1'
        lines.append(f'export TMPDIR="{cluster.scratch}"; {test} || {{ {unusable}; }}')
    lines.append(f"export PYTHONPATH={where.code}${{PYTHONPATH:+:$PYTHONPATH}}")
    lines.append(f"cd {where.run} || exit 1")
    return lines


def retry_lines(cluster: Cluster, python: str, where: Where, job: Job, submission: str) -> list[str]:
    """Shell lines that come first: when the script ends badly, ask whether the job is to be tried again.

    The script lives on when Slurm kills its task for want of memory, and ends as it would without this.
    """
    if not cluster.retries:
        return []
    command = _command([python, "-m", "pipeline.stages.retry"], where, job, submission)
    variables = f"SUBMITIT_EXECUTOR=slurm PYTHONPATH={where.code}"
    return [
        "try_again() {",
        "    status=$?",
        f'    [ "$status" -eq 0 ] || {variables} {command} "$status"',
        "}",
        "trap try_again EXIT",
        f'echo "{LOG_MARK}${{SLURM_RESTART_COUNT:-0}}" >&2',
    ]


def work_command(python: str, where: Where, job: Job, submission: str) -> str:
    """What a job runs, as a shell takes it."""
    return _command([python, "-u", "-m", "pipeline.stages.job"], where, job, submission)


def _command(argv: Sequence[str], where: Where, job: Job, submission: str) -> str:
    return f"{shlex.join(argv)} {where.run} {shlex.join([job.name, submission])}"


def shell_command(python: str, cluster: Cluster, run_root: Path, code: Path, job: Job, submission: str) -> list[str]:
    """A job's setup and work for a shell that becomes the work: what its sbatch script does, without Slurm."""
    where = Where.at(run_root, code)
    work = f"exec {work_command(python, where, job, submission)}"
    return ["bash", "-c", "\n".join([*setup_lines(cluster, where), work])]


def dependency(ended: Sequence[str], started: Sequence[str], kind: str = "afterok") -> str | None:
    """Slurm's words for "when those have ended well, and these have started"; None when there is nothing to await.

    `kind` is aftercorr where they are arrays: each task then waits for that of the same number.
    """
    parts = [":".join((each, *ids)) for each, ids in ((kind, ended), ("after", started)) if ids]
    return ",".join(parts) or None


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
