"""A checkpoint's folder on disk: filled beside its place by every rank, sealed by rank 0, trusted only when whole."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.run import atomic
from pipeline.run.hashing import sha256_file
from pipeline.training.snapshot import write_file

STATE = "state.json"
MANIFEST = "manifest.json"
PREFIX, BEST = "step-", "best-"
UNFINISHED = ".unfinished"
_PART = "part-{:05d}.json"

Manifest = dict[str, list[Any]]
"""File name to its size and its SHA-256."""


class AbandonedError(Exception):
    """Another rank could not write its part."""


def all_checkpoints(folder: Path, prefix: str = PREFIX) -> list[Path]:
    """Finished checkpoints, oldest first; with the prefix `BEST` the best models'."""
    return sorted(path for path in folder.glob(f"{prefix}*") if path.name[len(prefix) :].isdigit())


def write_part(unfinished: Path, rank: int, files: Mapping[str, Any]) -> None:
    """Write a rank's files, make them durable, and then say so in a manifest of its own."""
    with atomic.disk_errors(unfinished):
        for name, content in files.items():
            write_file(unfinished / name, content)
        atomic.write_json(unfinished / _PART.format(rank), _durable(unfinished, list(files)))


def seal(unfinished: Path, target: Path, ranks: int, abandoned: threading.Event) -> None:
    """When every rank's part is there: write the manifest, make all durable, and give the checkpoint its name.

    AbandonedError once `abandoned` is set: a part will never come.
    """
    names: Manifest = {}
    for rank in range(ranks):
        part = unfinished / _PART.format(rank)
        names |= _wait_for(part, abandoned)
        part.unlink()
    rest = (str(path.relative_to(unfinished)) for path in unfinished.rglob("*") if path.is_file())
    names |= _durable(unfinished, sorted(name for name in rest if name not in names))
    with atomic.disk_errors(unfinished):
        atomic.write_json(unfinished / MANIFEST, names)
        if target.exists():  # damaged, else nobody would write it again
            shutil.rmtree(target)
        os.replace(unfinished, target)
    atomic.sync_directory(target.parent)


def is_intact(path: Path) -> bool:
    """Whether every file of the manifest is there with its size and its hash."""
    try:
        names = atomic.read_json(path / MANIFEST)
    except UserError:
        return False
    if not isinstance(names, dict) or STATE not in names:
        return False
    return all(
        (path / name).is_file() and (path / name).stat().st_size == size and sha256_file(path / name) == digest
        for name, (size, digest) in names.items()
    )


def rotate(folder: Path, newest: Path, keep: int) -> None:
    """Remove the oldest checkpoints beyond `keep`, and the best models that no checkpoint that stays knows of.

    `newest`, which was just made, stays in any case. So does every best model behind the best that it knows of: a
    later checkpoint will know of that.
    """
    others = [path for path in all_checkpoints(folder) if path != newest]
    for old in others[: max(0, len(others) - keep + 1)]:
        shutil.rmtree(old)
    known = {_best_step(path) for path in all_checkpoints(folder)}
    latest = _best_step(newest) or 0
    for path in all_checkpoints(folder, BEST):
        step = int(path.name[len(BEST) :])
        if step < latest and step not in known:
            shutil.rmtree(path)


def _best_step(checkpoint: Path) -> int | None:
    """The best step that a checkpoint knows of; the supervised loop has it among what its method adds."""
    state: dict[str, Any] = atomic.read_json(checkpoint / STATE) or {}
    step: int | None = {**state.get("extra", {}), **state}.get("best_step")
    return step


def _durable(folder: Path, names: list[str]) -> Manifest:
    """Sync the named files; their sizes and hashes."""
    manifest: Manifest = {}
    with atomic.disk_errors(folder):
        for name in names:
            path = folder / name
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            manifest[name] = [path.stat().st_size, sha256_file(path)]
    return manifest


def _wait_for(part: Path, abandoned: threading.Event) -> Manifest:
    pause_s = 0.01
    while (manifest := atomic.read_json(part)) is None:
        if abandoned.is_set():
            raise AbandonedError
        time.sleep(pause_s)
        pause_s = min(0.5, 1.5 * pause_s)
    names: Manifest = manifest
    return names
