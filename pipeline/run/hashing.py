"""Content hashes of files and folders, and fingerprints of plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.run import atomic

_CHUNK = 1 << 22


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """The SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def hash_tree(path: Path, cache: HashCache | None = None) -> tuple[str, int]:
    """(sha256, bytes) of a file, or of a folder: there of the sorted list of (relative path, sha256) of its files."""
    hash_file = cache.sha256 if cache else sha256_file
    if path.is_file():
        return hash_file(path), path.stat().st_size
    files = sorted(_files(path))
    listing = [[str(file.relative_to(path)), hash_file(file)] for file in files]
    return fingerprint(listing), sum(file.stat().st_size for file in files)


def tree_bytes(path: Path) -> int:
    """The size of a file, or of all files below a folder; -1 when it is gone."""
    if path.is_file():
        return path.stat().st_size
    if not path.is_dir():
        return -1
    return sum(file.stat().st_size for file in _files(path))


def _files(folder: Path) -> Iterator[Path]:
    """The files below a folder, without __pycache__: Triton's Python leaves that in the store that it serves."""
    return (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


class HashCache:
    """Remembers the hashes of files that the run does not own (large inputs), by path, size, mtime and inode.

    Those four only decide whether to read a file again; what enters a fingerprint is always the content's hash.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = atomic.read_json(path) or {}
        self._changed = False

    def sha256(self, path: Path) -> str:
        """The file's SHA-256, from the cache where the file has not been touched since."""
        stat = path.stat()
        key = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        name = str(path.resolve())
        known = self._known.get(name)
        if known is not None and known[:3] == key:
            return str(known[3])
        digest = sha256_file(path)
        self._known[name] = [*key, digest]
        self._changed = True
        return digest

    def save(self) -> None:
        """Write what was learnt."""
        if self._changed:
            atomic.write_json(self._path, self._known)
