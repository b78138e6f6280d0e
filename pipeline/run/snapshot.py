"""code/<digest>/: the project's code as it was submitted, which the run's jobs run whatever happens to the checkout.

A job may start hours after it was submitted, and again after a preemption; an edit in between must not reach it.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from pipeline.resources import resource_dir
from pipeline.run import atomic, hashing
from pipeline.run.directory import RunDir

_BESIDE = ("slurm", "containers", "model_store_templates")
"""Folders that the package reads; in a checkout they stand beside it, in a wheel inside it."""
_PACKAGE = Path(__file__).resolve().parents[1]


def folder(run: RunDir) -> Path:
    """Where the present code is, or would be, in the run directory: the folder to import `pipeline` from."""
    content = {name: _digest(source) for name, source in _sources().items()}
    return run.root / "code" / hashing.fingerprint(content)[:16]


def take(run: RunDir) -> Path:
    """Copy the package into the run directory, unless this very code is there; returns the folder to import from."""
    target = folder(run)
    if target.is_dir():
        return target
    making = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:4]}")
    with atomic.disk_errors(making):
        for name, source in _sources().items():
            shutil.copytree(source, making / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        try:
            making.rename(target)
        except OSError:  # another submission of this run was faster
            shutil.rmtree(making)
            if not target.is_dir():
                raise
    return target


def _sources() -> dict[str, Path]:
    folders = {"pipeline": _PACKAGE}
    if not (_PACKAGE / "_resources").is_dir():
        folders |= {name: resource_dir(name) for name in _BESIDE}
    return folders


def _digest(source: Path) -> str:
    files = (path for path in sorted(source.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return hashing.fingerprint([[str(path.relative_to(source)), hashing.sha256_file(path)] for path in files])
