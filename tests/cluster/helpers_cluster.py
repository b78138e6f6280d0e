"""Settings of the chain on the private Slurm, and looking at its processes."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import yaml
from helpers_jobs import TINY, pids_running

from pipeline.run.directory import RunDir
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.view import view_run

STEPS = 60
CHAIN_SETTINGS = (
    *TINY,
    *("train.num_processes=2", "train.accelerate_config=ddp-cpu", "sandbox.engine=venv"),
    *(f"train.total_steps={STEPS}", f"train.eval_interval={STEPS // 2}"),
)
"""Of a training that can be disturbed several times; it stands still (`held`) while Slurm takes its time for that."""
PROFILE = {
    "name": "mini",
    "executor": "slurm",
    "partition": "gpu",
    "environment": {"HH_SITE": "a value with 'quotes'"},
    "grace_s": 60,
    "default": {"time_min": 30, "cpus": 4, "mem_gb": 8},
    "stages": {"train": {"time_min": 60, "cpus": 16, "mem_gb": 64, "gpus": 8}},
}


def profile(folder: Path, name: str, **changes: object) -> Path:
    """The tests' profile with some keys changed, as a file."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**PROFILE, "name": name, **changes}))
    return path


def separate(folder: Path, servers: int = 1) -> Path:
    """The profile with the server, or one on each of several nodes, in a job of its own."""
    stages = {
        "serve": {"time_min": 60, "cpus": 4, "mem_gb": 16, "gpus": 1, "nodes": servers},
        "train": {"time_min": 60, "cpus": 16, "mem_gb": 64, "gpus": 7},
    }
    return profile(folder, f"{servers}-apart", placement="separate", stages=stages)


def states(run: Path) -> dict[str, tuple[str, str]]:
    """Each stage's state and what status says of it, as asked now: what Slurm said before is forgotten."""
    submissions._asked.clear()
    return {view.stage: (view.state, view.detail) for view in view_run(RunDir(run))}


@contextlib.contextmanager
def held(run: Path) -> Iterator[list[int]]:
    """The ranks of the run's training, which stand still while the block runs: a fast machine would be done before what
    disturbs it comes."""
    ranks = pids_running(run, "-m pipeline.training.ppo", "-u")
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield ranks
    finally:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def tasks(run: Path, job: str | None = None) -> list[int]:
    """The processes that Slurm started for the jobs of the run, or for the one with these stages."""
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if _is_task(path, run, job)]


def _is_task(cmdline: Path, run: Path, job: str | None) -> bool:
    try:
        words = cmdline.read_bytes().decode().split("\0")
    except OSError:
        return False
    if "pipeline.stages.job" not in words or words[0].endswith("srun"):
        return False
    where, stages = words[words.index("pipeline.stages.job") + 1 :][:2]
    return where == str(run) and job in (None, stages)


def children(parents: list[int], word: str = "") -> list[int]:
    """The processes that these started, with a word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            line = path.with_name("cmdline").read_bytes().decode()
        except OSError:
            continue
        if parent in parents and word in line:
            found.append(int(path.parent.name))
    return found


def environment_of(pid: int) -> dict[str, str]:
    """A process's environment, as it was started."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.partition("=")[::2] for entry in entries if entry)
