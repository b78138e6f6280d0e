"""What Triton keeps in /dev/shm: named for its owner, closed to other users, and removed when its owner was killed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import uuid
from pathlib import Path

from pipeline import procs
from pipeline.run import owner

_FOLDER = Path("/dev/shm")
_REGION = re.compile(r"triton_hh_(?P<namespace>\d+)_(?P<pid>\d+)_(?P<start>\d+)_")


def region_prefix(supervisor: procs.ProcessId, store: Path) -> str:
    """How the regions of a server with that supervisor and store are named: known after the death of both."""
    name = f"{owner.pid_namespace()}_{supervisor.pid}_{supervisor.start}_{store_mark(store)}"
    return f"triton_hh_{name}_{uuid.uuid4().hex[:8]}_"


def store_mark(store: Path) -> str:
    """What the regions' names say of a model store."""
    return hashlib.sha256(str(store.resolve()).encode()).hexdigest()[:8]


def close_regions(prefix: str, folder: Path = _FOLDER) -> None:
    """Keep other users from a server's regions: Triton makes them readable for all, whatever the umask.

    They are made while a model loads; texts are in them once clients know of the server.
    """
    for path in folder.glob(f"{prefix}*"):
        with contextlib.suppress(FileNotFoundError):
            path.chmod(0o600)


def sweep(prefix: str, folder: Path = _FOLDER) -> list[str]:
    """Remove the regions that our killed servers left in /dev/shm; returns their names.

    Only this user's, and only what no process maps: those named by `prefix`, and those whose supervisor is dead. A
    living supervisor's are left alone, since its server may have created but not yet mapped them; so are those of
    another container, whose processes cannot be seen from here, and those of other people's Tritons.
    """
    doomed = {}
    for path in folder.glob("triton_hh_*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_uid == os.getuid() and (path.name.startswith(prefix) or _orphaned(path.name)):
                doomed[path.name] = path
    if not doomed:
        return []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            text = maps.read_text("utf-8", "replace")
            for name in [name for name in doomed if name in text]:
                del doomed[name]
    for path in doomed.values():
        path.unlink(missing_ok=True)
    return sorted(doomed)


def _orphaned(name: str) -> bool:
    """Whether a region bears the name of a supervisor of this container that has ended."""
    match = _REGION.match(name)
    return match is not None and owner.has_ended(match["namespace"], int(match["pid"]), int(match["start"]))
