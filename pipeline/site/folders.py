"""Which folders a run writes to, and whether they will do."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.run.directory import RunDir
from pipeline.run.sources import EMBEDDED
from pipeline.serving.sandbox import cache_dir
from pipeline.site.findings import Finding, Level
from pipeline.site.storage import GIB, Folder

TOPIC = "Folders"
OF_ONE_NODE = ("tmpfs", "ramfs", "overlay", "devtmpfs", "squashfs")
"""File systems that no other node sees."""
OF_ALL_NODES = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "panfs", "wekafs", "cifs", "afs", "9p")
"""File systems that other machines can see too."""
_LOCAL_PATHS = ("/tmp", "/var/tmp", "/dev/shm", "/run")
_SHM_GIB = 1
_IMAGE_GIB = 20
_INODES = 100_000


@dataclass(frozen=True)
class Use:
    """What a folder is for."""

    path: Path
    name: str
    key: str
    """Which setting or variable moves it."""
    gib: int
    """Below so much free space it is too small."""
    shared: bool = True
    """Whether all nodes must see it."""
    unpacks: bool = False
    """Whether an image is unpacked there, with programs that are run."""


def uses(run: RunDir, config: Config, engine: str, environ: Mapping[str, str] = os.environ) -> list[Use]:
    """The folders of this run. A $VARIABLE that only jobs know cannot be followed from here."""
    size = billions(config)
    home = Path.home()
    xdg = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    common = Path(config.cluster.cache).expanduser() if config.cluster.cache else None
    hub = common or Path(environ.get("HF_HOME") or xdg / "huggingface")
    found = [
        Use(run.root, "run directory", "--run-dir", max(1, round(12 * size))),
        Use(
            cache_dir(config), "the server's cache", "sandbox.cache_dir", _cache_gib(engine), unpacks=engine != "docker"
        ),
        Use(Path(tempfile.gettempdir()), "temporary files", "TMPDIR", 1, shared=False),
    ]
    if config.model.path != EMBEDDED:
        found.append(Use(hub, "models and data", "cluster.cache or HF_HOME", max(5, round(8 * size))))
    if engine in ("apptainer", "singularity"):
        found += _of_image(engine, environ)
    scratch = config.cluster.scratch
    if scratch and not _of_jobs(scratch):
        found.append(Use(Path(os.path.expandvars(scratch)), "scratch", "cluster.scratch", 10, shared=False))
    return found


def billions(config: Config) -> float:
    """Parameters of the model, in billions, as its name says; where it says nothing, those of the largest usual ones.

    A run holds a few copies: checkpoints, the converted reward model, the result. The hub's cache holds the policy's
    and the reward model's weights, in float32 at times.
    """
    if config.model.path == EMBEDDED:
        return 0.0
    match = re.search(r"(\d+(?:\.\d+)?)([bm])\b", config.model.path.rstrip("/").rpartition("/")[2].lower())
    if match is None:
        return 8.0
    return float(match[1]) / (1000 if match[2] == "m" else 1)


def judge(looks: Mapping[str, Folder | None], wanted: list[Use], config: Config) -> list[Finding]:
    """What is wrong with each folder. `looks` are by the names of `wanted`."""
    slurm = config.cluster.executor == "slurm"
    findings = []
    for use in wanted:
        folder = looks.get(use.name)
        if folder is None:
            what = f"{use.name} ({use.path}): its file system does not answer"
            findings.append(Finding(TOPIC, "fail", what, f"wait for it, or move the folder: {use.key}"))
        else:
            findings += _judge_one(folder, use, slurm)
    if slurm and config.cluster.scratch and _of_jobs(config.cluster.scratch):
        what = f"cluster.scratch: {config.cluster.scratch} is known to jobs only, so it was not looked at"
        findings.append(Finding(TOPIC, "unknown", what, "run the doctor inside a job: srun python -m pipeline.doctor"))
    return findings


def judge_shm(folder: Folder | None) -> list[Finding]:
    """/dev/shm: tritonserver's Python backend exchanges tensors through it."""
    if folder is None or folder.kind != "tmpfs":
        what = "/dev/shm is no memory file system, which tritonserver's Python backend needs"
        return [Finding(TOPIC, "fail", what, "mount a tmpfs there; in a container, --ipc=host or --shm-size=2g")]
    size = f"/dev/shm has {_size(folder.free)} free"
    if not folder.writable:
        return [Finding(TOPIC, "fail", "/dev/shm cannot be written to", "ask who runs this machine")]
    if folder.free < _SHM_GIB * GIB:
        remedy = "remove what was left there (ls -l /dev/shm), or enlarge it: in a container, --shm-size=2g"
        return [Finding(TOPIC, "warn", f"{size}: little for tritonserver's Python backend", remedy)]
    return [Finding(TOPIC, "ok", size)]


def is_local(path: str, kind: str) -> bool:
    """Whether other nodes surely cannot see a path."""
    return kind in OF_ONE_NODE or any(path == top or path.startswith(f"{top}/") for top in _LOCAL_PATHS)


def _judge_one(folder: Folder, use: Use, slurm: bool) -> list[Finding]:
    where = f"{use.name} ({folder.path})"
    move = f"another folder: {use.key}"

    def finding(level: Level, what: str, remedy: str) -> Finding:
        return Finding(TOPIC, level, f"{where}: {what}", remedy)

    found = []
    if not folder.writable:
        inside = "" if folder.existing == folder.path else f" in {folder.existing}"
        return [finding("fail", f"you cannot write{inside}", move)]
    if folder.broken:
        found.append(finding("fail", f"does not work there: {', '.join(folder.broken)}", move))
    if folder.free < use.gib * GIB:
        level: Level = "fail" if folder.free < use.gib * GIB / 4 else "warn"
        found.append(finding(level, f"{_size(folder.free)} free, and some {use.gib} GiB are needed", move))
    if folder.free_inodes is not None and folder.free_inodes < _INODES:
        found.append(finding("warn", f"room for {folder.free_inodes} more files only (inodes)", move))
    if folder.quota:
        found.append(finding("warn", folder.quota, f"remove what is not needed, or take {move}"))
    if use.unpacks and "noexec" in folder.options:
        found.append(finding("fail", "programs cannot be run there (noexec)", move))
    if slurm and use.shared and is_local(folder.path, folder.kind):
        what = f"on a file system of this machine alone ({folder.kind or 'unknown'}), and jobs run on others"
        found.append(finding("warn", what, f"take a folder that all nodes see: {use.key}"))
    if not found:
        what = f"{_size(folder.free)} free, {folder.kind or 'unknown file system'}"
        if not slurm or not use.shared or folder.kind in OF_ALL_NODES:
            found.append(finding("ok", what, ""))
        else:
            seen = f"look from a node: srun ls -d {folder.existing}; if not, {move}"
            found.append(finding("unknown", f"{what}; all nodes must see it", seen))
    return found


def _cache_gib(engine: str) -> int:
    """The environment of engine "venv"; an image as it was fetched, with the engine's own cache, and as it is run."""
    return 3 * _IMAGE_GIB if engine in ("apptainer", "singularity") else 8


def _of_image(engine: str, environ: Mapping[str, str]) -> list[Use]:
    """Where Apptainer and Singularity unpack an image, and what they keep where a person has moved it."""
    key = engine.upper()
    temporary, kept = (
        environ.get(f"APPTAINER_{name}") or environ.get(f"SINGULARITY_{name}") for name in ("TMPDIR", "CACHEDIR")
    )
    place = Path(temporary or environ.get("TMPDIR") or "/tmp")
    found = [Use(place, "unpacking images", f"{key}_TMPDIR", _IMAGE_GIB, shared=False, unpacks=True)]
    if kept:
        found.append(Use(Path(kept), "the engine's cache", f"{key}_CACHEDIR", _IMAGE_GIB, shared=False))
    return found


def _size(count: int) -> str:
    gib = count / GIB
    return f"{gib:.0f} GiB" if gib >= 10 else f"{gib:.1f} GiB"


def _of_jobs(text: str) -> bool:
    """Whether a path of the profile holds variables that this shell does not know."""
    return re.search(r"\$[\w{]", os.path.expandvars(text)) is not None
