"""A lock file that works on network file systems: exclusive creation, with an owner that can be checked."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from pipeline import procs
from pipeline.errors import UserError
from pipeline.run.atomic import disk_errors

_GATE_S = 10.0
"""Seconds after which a takeover that did not end was left by a crash; it takes a few milliseconds."""


class Held(UserError):
    """Another live process holds the lock."""


@contextlib.contextmanager
def lock(path: Path, purpose: str) -> Iterator[None]:
    """Hold `path` while the block runs; raises Held when another live process holds it.

    The lock guards planning and submitting only; jobs never hold it. A dead owner's lock is taken over.
    """
    owner = json.dumps({**asdict(procs.this_process()), "purpose": purpose, "since": time.time()})
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _acquire(path, owner)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            if path.read_text() == owner:
                path.unlink()


def _acquire(path: Path, owner: str) -> None:
    while True:
        # Written beside and hard-linked: a reader never sees a lock without its owner.
        mine = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}")
        mine.write_text(owner)
        try:
            os.link(mine, path)
            return
        except FileExistsError:
            pass
        finally:
            mine.unlink()
        _clear_if_stale(path)


def _clear_if_stale(path: Path) -> None:
    """Remove a dead owner's lock; raise Held about a live one."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return
    held = json.loads(text)
    holder = procs.ProcessId(held["host"], held["pid"], held["start"], held["boot"])
    if holder.alive():
        since = time.strftime("%H:%M:%S", time.localtime(held["since"]))
        raise Held(
            f"{path}: process {holder.pid} on {holder.host} has been busy with this run since {since} "
            f"({held['purpose']}); wait for it, or delete the file if that process is gone"
        )
    # Removing is for one finder at a time: between looking and removing, another's new lock must not slip in.
    gate = path.with_name(f"{path.name}.takeover")
    try:
        os.close(os.open(gate, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - gate.stat().st_mtime > _GATE_S:  # its finder died in between
                gate.unlink()
        time.sleep(0.02)
        return
    with contextlib.suppress(FileNotFoundError):
        if path.read_text() == text:
            path.unlink()
    gate.unlink(missing_ok=True)
