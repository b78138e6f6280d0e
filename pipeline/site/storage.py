"""Folders that a run writes to: space, inodes, quota, kind of file system, and what it can do (tried for real)."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.site.ask import Answer, ask, together

GIB = 1024**3
_FOLDER_S = 6.0


@dataclass(frozen=True)
class Folder:
    """A folder's file system. `path` need not exist: then `existing` is what it would be made in."""

    path: str
    existing: str
    kind: str = ""
    """Type of file system, as in nfs4, lustre, ext4, tmpfs."""
    options: tuple[str, ...] = ()
    free: int = 0
    """Bytes that this user may still write, quotas apart."""
    free_inodes: int | None = None
    """None where the file system does not count them."""
    writable: bool = False
    broken: tuple[str, ...] = ()
    """Which of "hard links", "atomic rename", "exclusive creation", "locks" does not work there."""
    quota: str = ""
    """What is wrong with the quota; empty: nothing, or nothing known."""


@dataclass(frozen=True)
class Mount:
    """A line of /proc/mounts."""

    point: str
    kind: str
    options: tuple[str, ...]


def probe(paths: Mapping[str, Path]) -> dict[str, Folder | None]:
    """Look at folders at once; None for one that did not answer (a file system that hangs)."""
    mounts = read_mounts(Path("/proc/mounts").read_text("utf-8", "replace"))
    questions = {name: functools.partial(look, path, mounts) for name, path in paths.items()}
    return together(questions, _FOLDER_S)


def look(path: Path, mounts: Sequence[Mount]) -> Folder:
    """One folder. What it can do is tried in a temporary folder that is removed."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    mount = mount_of(existing.resolve(), mounts)
    space = os.statvfs(existing)
    writable = os.access(existing, os.W_OK | os.X_OK)
    return Folder(
        str(path),
        str(existing),
        mount.kind,
        mount.options,
        space.f_bavail * space.f_frsize,
        space.f_favail if space.f_files else None,
        writable,
        _try(existing) if writable else (),
        _quota(mount),
    )


def read_mounts(text: str) -> list[Mount]:
    """The mounts in the text of /proc/mounts."""
    rows = (line.split() for line in text.splitlines())
    return [Mount(row[1].replace("\\040", " "), row[2], tuple(row[3].split(","))) for row in rows if len(row) >= 4]


def mount_of(path: Path, mounts: Sequence[Mount]) -> Mount:
    """The mount that a path is on: the longest point above it, and of several there the last."""
    above = {str(path), *map(str, path.parents)}
    found = [mount for mount in mounts if mount.point in above]
    return max(reversed(found), key=lambda mount: len(mount.point), default=Mount("/", "", ()))


def read_quota(text: str) -> str:
    """What is wrong, in the output of `quota -w` or `lfs quota -q`: rows of use, soft and hard limit, grace; files."""
    for line in text.splitlines():
        words = line.split()
        blocks = words[1:4]
        if len(blocks) < 3 or not all(word.rstrip("*").isdigit() for word in blocks):
            continue
        used, soft, hard = (int(word.rstrip("*")) for word in blocks)
        limit = hard or soft
        if "*" in "".join(words[1:]):
            return f"the quota is exceeded (see quota -s): {used // 2**20} of {limit // 2**20} GiB"
        if limit and used > 0.9 * limit:
            return f"the quota is nearly used up: {used // 2**20} of {limit // 2**20} GiB"
    return ""


def _quota(mount: Mount) -> str:
    if mount.kind == "lustre" and shutil.which("lfs"):
        answer = ask(["lfs", "quota", "-q", "-u", str(os.getuid()), mount.point])
    elif shutil.which("quota") and mount.kind not in ("tmpfs", "overlay"):
        answer = ask(["quota", "-w", "-f", mount.point])
    else:
        answer = Answer(None, "")
    # quota ends with status 1 where a limit is exceeded.
    return read_quota(answer.text) if answer.status in (0, 1) else ""


def _try(folder: Path) -> tuple[str, ...]:
    """What does not work in the folder, of what runs rely on."""
    trials: dict[str, Callable[[Path], None]] = {
        "hard links": lambda inside: os.link(inside / "a", inside / "b"),
        "atomic rename": _rename,
        "exclusive creation": _create,
    }
    broken = []
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".hh-doctor-", dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        return (f"making a folder ({error.strerror})",)
    with temporary as name:
        inside = Path(name)
        for what, trial in trials.items():
            try:
                (inside / "a").write_text("a")
                trial(inside)
            except OSError as error:
                broken.append(f"{what} ({error.strerror})")
    return tuple(broken)


def _rename(inside: Path) -> None:
    (inside / "new").write_text("new")
    os.replace(inside / "new", inside / "a")
    if (inside / "a").read_text() != "new":
        raise OSError(0, "the old content stayed")


def _create(inside: Path) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    os.close(os.open(inside / "once", flags))
    try:
        os.close(os.open(inside / "once", flags))
    except FileExistsError:
        return
    raise OSError(0, "it succeeded twice")
