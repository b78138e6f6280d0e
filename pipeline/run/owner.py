"""Whose something on a node is: a name tells its owner, so that what a killed process left can be told and removed."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from pipeline import procs
from pipeline.run.build_cache import remove_folder

_MARK = re.compile(r"hh_(?P<host>[0-9a-f]{8})_(?P<namespace>\d+)_(?P<pid>\d+)_(?P<start>\d+)_")


def mark(owner: procs.ProcessId) -> str:
    """A part of a name that says whose it is."""
    return f"hh_{_host(owner.host)}_{pid_namespace()}_{owner.pid}_{owner.start}_"


def is_orphaned(name: str) -> bool:
    """Whether the name bears the mark of a process of this node and container that has ended.

    Of others nothing is known here: the folder, or the daemon, may be shared with another node.
    """
    found = _MARK.search(name)
    if found is None or found["host"] != _host(os.uname().nodename):
        return False
    return has_ended(found["namespace"], int(found["pid"]), int(found["start"]))


def has_ended(namespace: str, pid: int, start: int) -> bool:
    """Whether a process of this container's has ended; False for those of another, which cannot be seen from here."""
    if namespace != pid_namespace():
        return False
    owner = procs.process_of(pid)
    return owner is None or owner.start != start or not owner.alive()


def pid_namespace() -> str:
    """Identifies the set of processes that this one can see."""
    return str(os.stat("/proc/self/ns/pid").st_ino)


def sweep_folders(parent: Path, prefix: str) -> list[str]:
    """Remove this user's orphaned folders of that prefix; returns their names."""
    doomed = [path for path in parent.glob(f"{prefix}*") if is_orphaned(path.name) and _is_own_folder(path)]
    for path in doomed:
        remove_folder(path)
    return sorted(path.name for path in doomed)


def _is_own_folder(path: Path) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:  # another one sweeps, too
        return False
    return path.is_dir() and not path.is_symlink() and found.st_uid == os.getuid()


def _host(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:8]
