"""What takes long to build and is the same for all runs: built once, kept in a cache, trusted only when complete."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline import procs
from pipeline.run import atomic
from pipeline.run.lock import Held, lock
from pipeline.run.watch import Watch

MANIFEST = "manifest.json"
_WAIT_S = 3600.0
_BEAT_S = 10.0
_LOST_S = 180.0
"""A lock of another node that has not moved for so long belongs to nobody; shared file systems show changes late."""

logger = logging.getLogger(__name__)

Builder = Callable[[Path], dict[str, Any]]
"""Fills a new folder and returns the manifest that it wrote there, last."""


def cached(cache: Path, name: str, build: Builder, usable: Callable[[Path], bool]) -> tuple[Path, dict[str, Any], bool]:
    """Return (folder, manifest, whether it was built now) of the cache entry `name`.

    An entry is built in a folder beside it and renamed when complete, so whatever bears the name can be trusted;
    one builder works at a time and others wait for it. What an interrupted builder left is removed by the next.
    """
    folder, building = cache / name, cache / f"{name}.building"

    def found() -> dict[str, Any] | None:
        manifest: dict[str, Any] | None = atomic.read_json(folder / MANIFEST)
        return manifest if manifest is not None and usable(folder) else None

    manifest = found()
    if manifest is not None:
        return folder, manifest, False
    with exclusive(cache / f"{name}.lock", f"building {name}"):
        manifest = found()
        if manifest is not None:  # another builder finished between our two looks
            return folder, manifest, False
        remove_folder(building)
        remove_folder(folder)
        with atomic.disk_errors(building):
            building.mkdir(parents=True)
        try:
            manifest = build(building)
            building.rename(folder)
        finally:
            remove_folder(building)
        atomic.sync_directory(cache)
        return folder, manifest, True


def remove_folder(folder: Path) -> None:
    """Remove what is there; an image that was unpacked half-way has folders that their owner may not write to."""
    for path, _, _ in os.walk(folder):
        with contextlib.suppress(OSError):
            os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def exclusive(lock_file: Path, purpose: str) -> Iterator[None]:
    """Hold the lock while the block runs, after whoever holds it now, on this node or another."""
    deadline, others = time.monotonic() + _WAIT_S, _Others(lock_file)
    with contextlib.ExitStack() as held:
        while True:
            while others.building():
                time.sleep(0.5)
                if time.monotonic() > deadline:
                    break
            try:
                held.enter_context(lock(lock_file, purpose))
                break
            except Held:  # another was faster
                if time.monotonic() > deadline:
                    raise
        held.enter_context(_beating(lock_file))
        yield


class _Others:
    """Whether somebody is building. A process of another node cannot be looked at: its lock file must keep moving."""

    def __init__(self, lock_file: Path) -> None:
        self._file = lock_file
        self._watch = Watch()
        self._told = ""

    def building(self) -> bool:
        """Whether a live process holds the lock. That of a dead one of another node is removed."""
        try:
            text, moved = self._file.read_text(), self._file.stat().st_mtime
        except FileNotFoundError:
            return False
        held = json.loads(text)
        holder = procs.ProcessId(held["host"], held["pid"], held["start"], held["boot"])
        if text != self._told:
            self._told = text
            logger.info("waiting for process %d on %s, which is %s", holder.pid, holder.host, held["purpose"])
        if holder.here:
            return holder.alive()
        if self._watch.still_s((text, moved)) < _LOST_S:
            return True
        self._remove(text)
        return False

    def _remove(self, text: str) -> None:
        """Take the lock away, unless it has become another's meanwhile: then it is put back."""
        aside = self._file.with_name(f"{self._file.name}.lost.{os.uname().nodename}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            self._file.rename(aside)
            if aside.read_text() != text:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self._file)
            aside.unlink()


@contextlib.contextmanager
def _beating(lock_file: Path) -> Iterator[None]:
    """Touch the lock every few seconds while the block runs, for those who wait on other nodes."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(lock_file)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
