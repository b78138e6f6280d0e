"""Atomic writes: whatever another process reads is written to a temporary file, synced and renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import UserError

_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or choose another place",
    errno.EDQUOT: "the quota is used up; free some space or choose another place",
    errno.EFBIG: "a file would be larger than is allowed; raise the limit (ulimit -f) or choose another place",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.EACCES: "permission denied; choose a place that you may write to",
    errno.EPERM: "operation not permitted; choose a place that you may write to",
}
_UNKNOWN = "the write failed half-way; look at free space, quotas and ulimit -f, or choose another place"
_RUST_NUMBER = re.compile(r"\(os error (\d+)\)")
_TORCH_WRITER = re.compile(r"PytorchStreamWriter|failed writing|inline_container\S* \. unexpected pos|iostream error")
_NEW, _OLD = ".new", ".old"
_HERE, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE, of renameat2(2)."""
_FULL_BYTES = 1 << 20
"""A file system with less than this free counts as full when a writer does not say why it failed."""


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into one clear line about `path`.

    Python's own errors are known by their number. safetensors and tokenizers (written in Rust) and torch.save raise
    errors of their own kinds, with the number in the message, in the error that came before, or nowhere.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        remedy = _remedy(error, path)
        if remedy is None:
            raise
        raise UserError(f"{path}: cannot write: {remedy}") from error


def _remedy(error: Exception, path: Path) -> str | None:
    """What to do about a failed write; None for an error that is none."""
    number = _error_number(error)
    if number is not None or not _TORCH_WRITER.search(str(error)):
        return _REMEDIES.get(number or 0)
    # torch's writer loses the number; where it wrote to a Python file, that file's error came before.
    before = error.__cause__ or error.__context__
    while before is not None:
        if (remedy := _REMEDIES.get(_error_number(before) or 0)) is not None:
            return remedy
        before = before.__cause__ or before.__context__
    return _REMEDIES[errno.ENOSPC] if _free_bytes(path) < _FULL_BYTES else _UNKNOWN


def _error_number(error: BaseException) -> int | None:
    """The system's error number that an exception carries or, when it comes from Rust, names."""
    if isinstance(error, OSError):
        return error.errno
    named = _RUST_NUMBER.search(str(error))
    return int(named[1]) if named else None


def _free_bytes(path: Path) -> int:
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


@contextlib.contextmanager
def atomic_file(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; on success sync it and rename it into place, on error remove it."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, mode)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
    sync_directory(path.parent)


def check_writable(path: Path, option: str) -> None:
    """UserError, about `option`, when nothing can be made beside `path`: before the work whose result it shall be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{option} {path}: cannot write in {path.parent} ({reason}); choose another place") from error


def write_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write `data` to `path` so that a reader sees the old content or the new one, never a part."""
    with atomic_file(path, mode) as file:
        file.write(data)


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode("utf-8"), mode)


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Write `value` as indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", mode)


def create_json(path: Path, value: Any) -> bool:
    """Write `value` unless the file exists; of several processes one succeeds. Returns whether this one did."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(value, file, indent=2, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
            os.link(name, path)  # a rename would replace what is there
        except FileExistsError:
            return False
        finally:
            os.unlink(name)
    sync_directory(path.parent)
    return True


def read_json(path: Path) -> Any | None:
    """Return the parsed file, or None when it does not exist. Files written by `write_json` are never partial."""
    try:
        text = _read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore it, or delete it to have it made again") from None


def _read(path: Path) -> str:
    """The file's text. Another node may have made it since this one last looked.

    NFS clients remember for up to a minute that a name was not there; listing the folder makes them look again.
    """
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        if path.name not in os.listdir(path.parent):
            raise
        return path.read_text("utf-8")


def append_line(path: Path, line: str) -> None:
    """Append one line with a single write, so that lines of several processes do not mix."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            data = line.encode("utf-8") + b"\n"
            written = os.write(descriptor, data)
            if written < len(data):  # the disk became full: writing the rest says so
                os.write(descriptor, data[written:])
        finally:
            os.close(descriptor)


def replace_symlink(link: Path, target: Path) -> None:
    """Make `link` point to `target` (stored relative to the link), in one step."""
    with disk_errors(link):
        link.parent.mkdir(parents=True, exist_ok=True)
        temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        temporary.symlink_to(os.path.relpath(target, link.parent))
        os.replace(temporary, link)


def private_folder(path: Path) -> Path:
    """Make `path` a folder that its owner alone may enter, whatever the umask, and even where it was open before."""
    with disk_errors(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_mode & 0o077:
            path.chmod(0o700)
    return path


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` that takes its place, in one step, when the block ends without an error.

    Whoever looks at `target` finds the old folder or the new one, whole, whenever this process dies; what it leaves
    beside is swept by the next. For one process at a time.
    """
    _sweep(target)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=_NEW))
        fresh.chmod(0o755)
    try:
        yield fresh
        with disk_errors(target):
            if not target.is_dir():
                os.rename(fresh, target)
            elif not _exchange(fresh, target):
                # Two steps, for file systems that cannot swap two names: in between, the next start puts it right.
                old = target.with_name(f".{target.name}{_OLD}")
                os.rename(target, old)
                try:
                    os.rename(fresh, target)
                except OSError:
                    os.rename(old, target)
                    raise
                shutil.rmtree(old)
            sync_directory(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # by now the old one, or what an error left


def _sweep(target: Path) -> None:
    """Remove what earlier replacements of `target` left behind, or undo a half of one."""
    old = target.with_name(f".{target.name}{_OLD}")
    if old.is_dir() and not target.exists():
        os.rename(old, target)
    for left in (old, *target.parent.glob(f".{glob.escape(target.name)}.*{_NEW}*")):
        shutil.rmtree(left, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where kernel, C library or file system cannot."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is None:
        return False
    if swap(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def sync_directory(path: Path) -> None:
    """Make renames inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
