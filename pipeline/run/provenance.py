"""provenance.json: what was run, with which code and packages, where, by whom and when."""

from __future__ import annotations

import getpass
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline import __version__, procs
from pipeline.errors import UserError
from pipeline.run import atomic
from pipeline.run.directory import LAYOUT_VERSION, RunDir

_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "submitit", "tritonclient", "wandb")


def describe(argv: list[str]) -> dict[str, Any]:
    """Everything that is worth knowing later about a submission."""
    return {
        "layout_version": LAYOUT_VERSION,
        "version": __version__,
        "command": argv,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "host": os.uname().nodename,
        "user": getpass.getuser(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def write(run: RunDir, image: str | None = None, digest: str | None = None) -> None:
    """Record this process's submission; `image` is the file of the trainer's, `digest` what identifies its content."""
    made_in = {"trainer_image": {"file": image, "digest": digest}} if digest is not None else {}
    atomic.write_json(run.provenance, {**describe(sys.argv), **made_in})


def trainer_image(run: RunDir) -> dict[str, str] | None:
    """File and digest of the image that the latest submission's work runs in, or None."""
    found: dict[str, str] | None = (atomic.read_json(run.provenance) or {}).get("trainer_image")
    return found


def check_layout(run: RunDir) -> None:
    """Refuse a folder that is no run directory, or one of another layout version."""
    if not run.root.exists():
        return
    if not run.root.is_dir():
        raise UserError(f"{run.root}: is a file; choose another --run-dir")
    recorded = atomic.read_json(run.provenance)
    if recorded is None:
        if not run.config.exists() and any(run.root.iterdir()) and not (run.root / "control").is_dir():
            raise UserError(f"{run.root}: not empty and not a run directory; choose another --run-dir")
        return
    version = recorded.get("layout_version")
    if version != LAYOUT_VERSION:
        raise UserError(
            f"{run.root}: made by version {recorded.get('version', 'unknown')} of this project (layout {version}, "
            f"this one reads {LAYOUT_VERSION}); use that version, or start a new --run-dir"
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with "+" when files differ from it; None outside a checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        status, head = procs.capture(["git", "-C", str(folder), "rev-parse", "HEAD"], timeout_s=5)
        _, dirty = procs.capture(["git", "-C", str(folder), "status", "--porcelain", "-uno"], timeout_s=5)
    except UserError:  # git is not installed, or too slow here: the commit is unknown
        return None
    return head.strip() + ("+" if dirty.strip() else "") if status == 0 else None
