"""Who may enter and change a model store: its code runs in our name, and its weights are the reward."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from pipeline.errors import UserError

logger = logging.getLogger(__name__)


def seal(store: Path) -> None:
    """Close a finished store, whatever the umask: only its owner may enter it, and its files are not written again.

    Its folders stay the owner's to delete. A file with a second name (weights are hard-linked) keeps its mode, which is
    that of the other name too.
    """
    for path in store.rglob("*"):
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            path.chmod(stat.S_IMODE(found.st_mode) & ~0o022)
        elif stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
            path.chmod(stat.S_IMODE(found.st_mode) & ~0o222)
    store.chmod(0o700)


def check(store: Path) -> None:
    """UserError when every user may change a file of the store, or put another store in its place.

    The group's right to write is left to those who share a run directory: who may write there, may replace all of it.
    """
    store = store.resolve()
    inside = store.rglob("*") if store.stat().st_mode & 0o001 else ()  # else nobody gets at it
    for path in (store, *inside, *store.parents):
        if not _open_to_all(path):
            continue
        if path in store.parents and path.stat().st_uid != os.getuid():  # not ours to mend
            logger.warning("%s: every user may write to it, and so replace what is served from %s", path, store)
            continue
        raise UserError(f"{path}: every user may write to it, and so replace the served model; run: chmod o-w {path}")


def _open_to_all(path: Path) -> bool:
    """Whether others than owner and group may write; in a folder like /tmp they may not replace what is ours."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:  # another server of the store has just renamed it, as Python does with what it compiles
        return False
    if stat.S_ISLNK(mode) or not mode & 0o002:
        return False
    return not (stat.S_ISDIR(mode) and mode & stat.S_ISVTX)
