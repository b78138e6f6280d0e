"""Settings of the chain on the private Slurm, and looking at its processes."""

from __future__ import annotations

from pathlib import Path

from helpers_jobs import TINY

CHAIN_SETTINGS = (
    *TINY,
    *("train.num_processes=2", "train.accelerate_config=ddp-cpu", "sandbox.engine=venv"),
    *("train.total_steps=200", "train.eval_interval=100"),  # longer than Slurm takes to preempt a job
)
PROFILE = {
    "name": "mini",
    "executor": "slurm",
    "partition": "gpu",
    "environment": {"HH_SITE": "a value with 'quotes'"},
    "grace_s": 60,
    "default": {"time_min": 30, "cpus": 4, "mem_gb": 8},
    "stages": {"train": {"time_min": 60, "cpus": 16, "mem_gb": 64, "gpus": 8}},
}


def is_task(cmdline: Path, run: Path) -> bool:
    """Whether a process is the one that Slurm started for a job of the run."""
    try:
        line = cmdline.read_bytes().decode()
    except OSError:
        return False
    return "pipeline.stages.job" in line and str(run) in line and not line.startswith(("srun", "/usr/bin/srun"))


def tasks(run: Path) -> list[int]:
    """Those processes."""
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if is_task(path, run)]


def environment_of(pid: int) -> dict[str, str]:
    """A process's environment, as it was started."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.partition("=")[::2] for entry in entries if entry)
