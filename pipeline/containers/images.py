"""Container images in the cache: fetched once, built once, named by digest, never changed while a job may use them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import procs
from pipeline.containers import registry
from pipeline.containers.command import build_argv, guarded
from pipeline.containers.source import Source, content_digest
from pipeline.containers.steps import run_step
from pipeline.errors import UserError
from pipeline.run import atomic
from pipeline.run.build_cache import MANIFEST, cached, exclusive

Note = Callable[[str], None]
"""Says what is being done, for the log and the status."""

_PINS = "tags.json"


@dataclass(frozen=True)
class Image:
    """An image that can be run."""

    engine: str
    file: str
    """A .sif file, a sandbox folder, or docker's name of the image with its digest."""
    digest: str
    """What it was made from: the registry's digest, or the content's of a local source."""
    built: bool
    """Whether it was built now, and not found in the cache."""


def fetch(source: Source, cache: Path, note: Note, fresh: bool = False) -> str:
    """Get what takes the network: the digest of a registry's image, and its files. Returns the source's digest.

    A tag keeps the digest that it was first found with, so that all runs of this cache get the same image; `fresh`
    asks the registry again. Nothing is fetched that the cache has.
    """
    if source.reference is None:
        digest = content_digest(source)
        assert digest is not None
        return digest
    digest = _pinned(source.reference, cache, fresh)
    if _origin(source, digest, cache) is None:
        layout = _layout(cache, digest)
        layout.mkdir(parents=True, exist_ok=True)
        with exclusive(layout.with_suffix(".lock"), f"fetching {source.reference}"):
            if _origin(source, digest, cache) is None:  # else another run has fetched it meanwhile
                registry.fetch(source.reference, digest, layout, note)
    return digest


def is_held(source: Source, digest: str, cache: Path) -> bool:
    """Whether the cache has what an image is built from, or the image itself, so that no network is needed."""
    if source.kind == "definition":
        return any(_made(cache, digest))
    return _origin(source, digest, cache) is not None


def make(source: Source, engine: str, folder: bool, cache: Path, log: Path, note: Note, fresh: bool = False) -> Image:
    """Make the image of `source` in the cache, as a .sif file or as a sandbox folder, unless it is there.

    What was fetched before needs no network now. UserError when a step fails; nothing half-built is left.
    """
    if engine == "docker":
        return _pull(source, log, note)
    digest = fetch(source, cache, note, fresh)
    if source.kind == "folder" or (source.kind == "sif" and not folder):
        return Image(engine, source.text, digest, built=False)  # it is what is wanted already: used where it is

    layout = _layout(cache, digest)

    def build(target: Path) -> dict[str, str]:
        note(f"building {'a sandbox' if folder else 'a .sif file'} of {source.text}")
        with exclusive(layout.with_suffix(".lock"), f"building from {layout.name}"):
            origin = _origin(source, digest, cache)
            assert origin is not None, "it was fetched above"
            argv = guarded(build_argv(engine, origin, target / _name(folder), folder))
            run_step(argv, build_environment(os.environ, cache), log, _build_remedy(folder))
        manifest = {"source": source.text, "digest": digest, "engine": f"{engine} {version(engine)}"}
        atomic.write_json(target / MANIFEST, manifest)
        return manifest

    entry = _entry(cache, digest, folder)
    path, _, built = cached(entry.parent, entry.name, build, lambda made: (made / _name(folder)).exists())
    if layout.exists():  # as large as the image, and not needed any more, once nobody builds from it
        with exclusive(layout.with_suffix(".lock"), f"removing {layout.name}"):
            shutil.rmtree(layout, ignore_errors=True)
    return Image(engine, str(path / _name(folder)), digest, built)


def unpack(image: Image, target: Path, log: Path, tick: procs.Tick) -> Image:
    """The image as a sandbox folder `target` on this node's own disk. Offline. `tick` is called meanwhile."""
    argv = guarded(build_argv(image.engine, image.file, target, folder=True))
    run_step(
        argv, build_environment(os.environ, target.parent), log, "set cluster.scratch to a larger local disk", tick
    )
    return Image(**{**asdict(image), "file": str(target), "built": True})


def version(engine: str) -> str:
    """What the engine calls itself, as in "1.4.5"."""
    status, text = procs.capture([engine, "--version"])
    return text.split()[-1] if status == 0 and text.split() else "unknown"


def build_environment(environ: Mapping[str, str], cache: Path) -> dict[str, str]:
    """The engine's environment: what it keeps does not go to the home folder, whose quota an image would fill."""
    env = dict(environ)
    for prefix in ("APPTAINER", "SINGULARITY"):
        env.setdefault(f"{prefix}_CACHEDIR", str(cache / "engine"))
    return env


def _pinned(reference: registry.Reference, cache: Path, fresh: bool) -> str:
    """The digest of a name: the recorded one, or else the registry's, which is recorded."""
    if reference.digest:
        return reference.digest
    pins: dict[str, str] = atomic.read_json(cache / _PINS) or {}
    if fresh or str(reference) not in pins:
        digest = registry.resolve(reference)
        with exclusive(cache / f"{_PINS}.lock", "pinning an image"):
            pins = {**(atomic.read_json(cache / _PINS) or {}), str(reference): digest}
            atomic.write_json(cache / _PINS, pins)
    return pins[str(reference)]


def _pull(source: Source, log: Path, note: Note) -> Image:
    if source.reference is None:
        raise UserError(f"sandbox.image: {source.text}: docker takes images of a registry; give docker://host/name:tag")
    name = source.text.removeprefix("docker://")
    note(f"pulling {name}")
    run_step(["docker", "pull", name], os.environ, log, "check sandbox.image")
    status, text = procs.capture(["docker", "image", "inspect", "--format={{index .RepoDigests 0}}", name])
    pinned = text.strip()
    if status != 0 or "@sha256:" not in pinned:
        raise UserError(f"sandbox.image: {name}: docker does not say which digest it has ({' '.join(text.split())})")
    return Image("docker", pinned, pinned.partition("@")[2], built=True)


def _origin(source: Source, digest: str, cache: Path) -> str | None:
    """What an engine builds from, without a network: the source's file, what was fetched, or the image in its other
    form; None where a registry's image is to be fetched first."""
    if source.reference is None:
        return source.text
    layout = _layout(cache, digest)
    if _is_whole(layout):
        return f"oci:{layout}"
    return next((str(path) for path in _made(cache, digest)), None)


def _made(cache: Path, digest: str) -> list[Path]:
    """The image's forms that the cache has."""
    forms = (_entry(cache, digest, form) / _name(form) for form in (False, True))
    return [path for path in forms if path.exists()]


def _is_whole(layout: Path) -> bool:
    """Whether the folder holds all of an image that was fetched: a purge of old files may have left parts of it."""
    index = atomic.read_json(layout / "index.json")
    if index is None:
        return False

    def there(*described: dict[str, Any]) -> bool:
        blobs = [registry.Blob(one["digest"], one["size"]) for one in described]
        return all(blob.path(layout).is_file() and blob.path(layout).stat().st_size == blob.size for blob in blobs)

    if not there(*index["manifests"]):
        return False
    (own,) = index["manifests"]
    manifest = json.loads(registry.Blob(own["digest"], own["size"]).path(layout).read_bytes())
    return there(manifest["config"], *manifest["layers"])


def _build_remedy(folder: bool) -> str:
    space = "the image needs two to three times its size in TMPDIR"
    if folder:
        return f"{space}; on a network file system take sandbox.format=sif, or a sandbox.cache_dir on a local disk"
    return f"{space}: set cluster.scratch to a large local disk"


def _entry(cache: Path, digest: str, folder: bool) -> Path:
    return cache / "images" / f"{_short(digest)}-{'sandbox' if folder else 'sif'}"


def _layout(cache: Path, digest: str) -> Path:
    return cache / "images" / f"{_short(digest)}-fetched"


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:16]


def _name(folder: bool) -> str:
    return "image" if folder else "image.sif"
