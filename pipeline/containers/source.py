"""What a container image is made from: `sandbox.image` in its forms, and what identifies its content."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.containers.registry import Reference, parse_reference
from pipeline.errors import UserError
from pipeline.run import hashing

_ARCHIVES = ("oci-archive:", "docker-archive:")
_FORMS = "docker://host/name:tag, oci-archive:FILE, docker-archive:FILE, a .sif or .def file, or a sandbox folder"


@dataclass(frozen=True)
class Source:
    """An image's origin. `path` is its file or folder; an image of a registry has a `reference` instead."""

    kind: Literal["registry", "archive", "sif", "definition", "folder"]
    text: str
    path: Path | None = None
    reference: Reference | None = None


def parse_source(image: str) -> Source:
    """Parse `sandbox.image`; UserError when it has none of the known forms, or its file is not there."""
    if image.startswith("docker://"):
        return Source("registry", image, reference=parse_reference(image))
    transport = next((prefix for prefix in _ARCHIVES if image.startswith(prefix)), None)
    path = Path(image.removeprefix(transport or "")).expanduser()
    if transport is None and not ("/" in image or path.suffix in (".sif", ".def") or path.exists()):
        raise UserError(f"sandbox.image: {image}: not an image; give {_FORMS}")
    if not path.exists():
        raise UserError(f"sandbox.image: {path}: no such file; give {_FORMS}")
    path = path.resolve()
    if transport is not None:
        return Source("archive", f"{transport}{path}", path)
    if path.is_dir():
        return Source("folder", str(path), path)
    if path.suffix not in (".sif", ".def"):
        raise UserError(
            f"sandbox.image: {path}: neither a .sif nor a .def file; archives are written oci-archive:{path}"
        )
    return Source("sif" if path.suffix == ".sif" else "definition", str(path), path)


def content_digest(source: Source, cache: hashing.HashCache | None = None) -> str | None:
    """The SHA-256 of a local source; None for a registry's, which `pipeline.containers.registry.resolve` knows.

    A sandbox folder's is that of its files' names and sizes: reading all of one takes minutes.
    """
    if source.path is None:
        return None
    if source.kind == "folder":
        files = sorted(path for path in source.path.rglob("*") if path.is_file() and not path.is_symlink())
        return hashing.fingerprint([[str(path.relative_to(source.path)), path.stat().st_size] for path in files])
    return hashing.hash_tree(source.path, cache)[0]
