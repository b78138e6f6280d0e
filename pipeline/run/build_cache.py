"""What takes long to build and is the same for all runs: built once, kept in a cache, trusted only when complete."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import procs
from pipeline.errors import UserError
from pipeline.run import atomic
from pipeline.run.lock import lock

MANIFEST = "manifest.json"
_WAIT_S = 3600.0

logger = logging.getLogger(__name__)

Builder = Callable[[Path], dict[str, Any]]
"""Fills a new folder and returns the manifest that it wrote there, last."""


def cached(cache: Path, name: str, build: Builder, usable: Callable[[Path], bool]) -> tuple[Path, dict[str, Any], bool]:
    """Return (folder, manifest, whether it was built now) of the cache entry `name`.

    An entry is built in a folder beside it and renamed when complete, so whatever bears the name can be trusted;
    one builder works at a time and others wait for it. What an interrupted builder left is removed by the next.
    """
    folder, building, lock_file = cache / name, cache / f"{name}.building", cache / f"{name}.lock"
    deadline = time.monotonic() + _WAIT_S
    while True:
        manifest = atomic.read_json(folder / MANIFEST)
        if manifest is not None and usable(folder):
            return folder, manifest, False
        if _held(lock_file):
            if time.monotonic() > deadline:
                raise UserError(f"{lock_file}: still held after {_WAIT_S:.0f} s; delete it if that build is gone")
            time.sleep(0.5)
            continue
        with lock(lock_file, f"building {name}"):
            if (folder / MANIFEST).exists() and usable(folder):  # another builder finished between our two looks
                continue
            shutil.rmtree(building, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
            with atomic.disk_errors(building):
                building.mkdir(parents=True)
            try:
                manifest = build(building)
                building.rename(folder)
            finally:
                shutil.rmtree(building, ignore_errors=True)
            atomic.sync_directory(cache)
            return folder, manifest, True


def _held(lock_file: Path) -> bool:
    """Whether a live process holds the lock."""
    held = atomic.read_json(lock_file)
    if held is None:
        return False
    holder = procs.ProcessId(held["host"], held["pid"], held["start"], held["boot"])
    if holder.alive():
        logger.info("waiting for process %d on %s, which is building %s", holder.pid, holder.host, lock_file.stem)
        return True
    return False
