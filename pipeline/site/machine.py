"""This machine and its Python: where we are, and whether the jobs' nodes can run this very interpreter."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.site.findings import Finding, Level
from pipeline.site.folders import is_local
from pipeline.site.storage import mount_of, read_mounts

TOPIC = "Machine and Python"


@dataclass(frozen=True)
class MachineFacts:
    """Where this program runs, and by what."""

    host: str
    system: str
    cpus: int
    """That this process may use."""
    memory_gb: int
    job: str | None = None
    """The Slurm job that this is inside of."""
    container: str = ""
    """The kind of container that this is inside of; empty outside."""
    python: tuple[int, ...] = (3, 11)
    prefix: str = "/usr"
    prefix_kind: str = ""
    """Type of the file system that the interpreter's environment is on."""
    base: str = "/usr"
    """Where the Python is that a virtual environment was made from."""
    base_kind: str = ""
    manager: str = "system"
    """venv, conda or system."""
    deepspeed: str | None = None
    tensorboard: str | None = None


def probe() -> MachineFacts:
    """Look at this process and its machine."""
    mounts = read_mounts(Path("/proc/mounts").read_text("utf-8", "replace"))
    release = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    return MachineFacts(
        os.uname().nodename,
        f"{release.get('PRETTY_NAME', platform.system())}, {platform.machine()}",
        len(os.sched_getaffinity(0)),
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1024**3,
        os.environ.get("SLURM_JOB_ID"),
        _container(),
        sys.version_info[:3],
        sys.prefix,
        mount_of(Path(sys.prefix).resolve(), mounts).kind,
        sys.base_prefix,
        mount_of(Path(sys.base_prefix).resolve(), mounts).kind,
        _manager(),
        _version("deepspeed"),
        _version("tensorboard"),
    )


def judge(facts: MachineFacts, config: Config, gpus: int) -> list[Finding]:
    """Whether stages and jobs can run with this Python, from here. `gpus`: those that a training here would have."""
    where = f"inside Slurm job {facts.job}" if facts.job else "not inside a job"
    inside = f", in a container ({facts.container})" if facts.container else ""
    size = f"{facts.cpus} CPUs, {facts.memory_gb} GiB"
    findings = [_finding("ok", f"{facts.host}: {facts.system}, {size}; {where}{inside}"), _python(facts)]
    slurm = config.cluster.executor == "slurm"
    places = {facts.prefix: facts.prefix_kind, facts.base: facts.base_kind}
    hidden = [path for path, kind in places.items() if is_local(path, kind)]
    if slurm and hidden:
        what = f"the jobs run this Python, and {hidden[0]} is on this machine alone ({places[hidden[0]]})"
        findings.append(
            _finding("fail", what, "make the environment in a folder that all nodes see, such as your home")
        )
    if slurm and facts.container:
        what = "Slurm's jobs start outside of this container, with the same paths"
        findings.append(
            _finding("warn", what, "run the pipeline outside, and give the container as cluster.trainer_image")
        )
    findings += _extras(facts, config, gpus)
    return findings


def _finding(level: Level, what: str, remedy: str = "") -> Finding:
    return Finding(TOPIC, level, what, remedy)


def _python(facts: MachineFacts) -> Finding:
    shown = ".".join(map(str, facts.python))
    if not (3, 10) <= facts.python[:2] <= (3, 12):
        return _finding("fail", f"Python {shown}: not one that the project runs on", "use Python 3.10, 3.11 or 3.12")
    base = f", made from {facts.base}" if facts.base != facts.prefix else ""
    return _finding("ok", f"Python {shown} ({facts.manager} {facts.prefix}{base})")


def _extras(facts: MachineFacts, config: Config, gpus: int) -> list[Finding]:
    findings: list[Finding] = []
    name = config.train.accelerate_config
    if config.cluster.trainer_image:  # it has packages of its own
        return findings
    if facts.deepspeed is None and ("zero" in name or (name == "auto" and gpus)):
        what = f"train.accelerate_config: {name} means DeepSpeed where there are GPUs, and it is not installed"
        remedy = "install the project's extra deepspeed, or set train.accelerate_config: ddp"
        findings.append(_finding("fail", what, remedy))
    elif facts.deepspeed:
        findings.append(_finding("ok", f"DeepSpeed {facts.deepspeed}"))
    if config.train.tracker == "tensorboard" and facts.tensorboard is None:
        what = "train.tracker: tensorboard is not installed"
        findings.append(_finding("fail", what, "install the project's extra tensorboard, or set train.tracker: none"))
    return findings


def _container() -> str:
    for variable in ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER"):
        if os.environ.get(variable):
            return variable.split("_")[0].lower()
    return "docker" if Path("/.dockerenv").exists() else ""


def _manager() -> str:
    if Path(sys.prefix, "conda-meta").is_dir():
        return "conda"
    return "venv" if sys.prefix != sys.base_prefix else "system"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
