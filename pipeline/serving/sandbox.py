"""The sandbox stage: prepares what tritonserver runs in, once a machine, and keeps it in a cache for all runs.

python -m pipeline.serving.sandbox --run RUN --out DIR
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import procs
from pipeline.config.schema import Config
from pipeline.containers import advisories, images, packages
from pipeline.containers.command import Bind, choose_engine, docker_argv, exec_argv, exec_environment
from pipeline.containers.images import Note
from pipeline.containers.source import Source, parse_source
from pipeline.errors import UserError, run_command
from pipeline.run import atomic, owner
from pipeline.run.build_cache import MANIFEST, cached
from pipeline.run.hashing import fingerprint
from pipeline.run.work import Progress, forced, parse_work, write_result
from pipeline.serving import environment, image_checks
from pipeline.serving.engines import Apptainer, Docker, Engine

_UNPACKED = "hh-image-"

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Prepare the sandbox and record where it is."""
    run, config, out = parse_work("Prepare the sandbox that tritonserver runs in.", argv)
    progress = Progress(out, total=4, every_s=0.0)
    steps = iter(range(1, 4))

    def note(text: str) -> None:
        logger.info("%s", text)
        progress.update(next(steps, 3), text)

    values = prepare(config, out / "build.log", note, forced(), run.values("prefetch").get("sandbox"))
    _warn_of_holes(values["tritonserver"])
    state = "built" if values["built"] else "found in the cache"
    logger.info("%s sandbox %s in %.1f s: %s", values["engine"], state, values["seconds"], values["path"])
    progress.update(4, state)
    write_result(out, {}, values)


def prepare(
    config: Config, log: Path, note: Note, fresh: bool = False, fetched: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Build the configured sandbox, or find it in the cache; return what `open_sandbox` needs.

    `fetched` is what the run's prefetch recorded: its image is taken, and no registry asked. Otherwise `fresh` looks
    again which image a tag stands for. Raises UserError when the engine is missing or a build step
    fails; nothing half-built is left to be trusted.
    """
    started = time.monotonic()
    engine = engine_of(config)
    if engine == "none":
        raise UserError('sandbox.engine: "none" starts no server and needs no sandbox; leave this stage out of `all`')
    if engine == "venv":
        if config.serving.flavour == "torchscript":
            raise UserError(
                "serving.flavour: torchscript is served by a container image; sandbox.engine found none and came to "
                '"venv", which has no PyTorch backend; install Apptainer, or use flavour python'
            )
        values = _prepare_venv(config, log, note)
    else:
        values = _prepare_container(config, engine, log, note, fresh, fetched or {})
    return {"engine": engine, **values, "seconds": round(time.monotonic() - started, 3)}


def fetch(
    config: Config,
    log: Path,
    note: Note,
    fresh: bool = False,
    earlier: Mapping[str, Any] | None = None,
    built: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fetch what a sandbox takes from the network, so that it can be built where there is none.

    Returns what was fetched, for the record; empty where nothing is needed, or the sandbox is made only with a network.
    `earlier` is what the run fetched before: the same image is fetched again, though its tag may have moved on.
    `built` is the run's sandbox, where it has one.
    """
    engine, cache = engine_of(config), cache_dir(config)
    if engine == "venv" and needs_wheels(config):
        environment.check_platform()
        pins = environment.requirements()
        if _has_venv(cache, pins, built or {}):
            return {}
        return {"packages": str(environment.fetch(pins, cache, log, note))}
    if engine in ("venv", "none", "docker"):
        return {}
    source = _as_fetched(parse_source(config.sandbox.image), earlier or {})
    fetched: dict[str, Any] = {"image": source.text}
    if source.kind == "definition":  # its build takes the network
        fetched["digest"] = images.make(source, engine, _as_folder(config), cache, log, note).digest
    else:
        fetched["digest"] = images.fetch(source, cache, note, fresh)
    if packages_bound(config):
        note("fetching the server's Python packages")
        pins, python = environment.package_pins(config.sandbox.python), config.sandbox.python
        fetched["packages"] = str(packages.install(pins, python, cache, log)[0])
    return fetched


def lost(config: Config, fetched: Mapping[str, Any], built: Mapping[str, Any]) -> str | None:
    """What a sandbox is made from and the cache has no more, though it was fetched; None when all is there."""
    engine, cache = engine_of(config), cache_dir(config)
    if engine == "venv" and needs_wheels(config):
        pins = environment.requirements()
        there = environment.fetched(pins, cache) is not None or _has_venv(cache, pins, built)
        return None if there else f"the packages of the server's environment are not in {cache}"
    if "digest" not in fetched:
        return None
    if not images.is_held(_as_fetched(parse_source(config.sandbox.image), fetched), fetched["digest"], cache):
        return f"its image {fetched['image']} is not in {cache} any more"
    site = fetched.get("packages")
    return f"its packages are gone ({site})" if site and not packages.is_whole(Path(site)) else None


def needs_wheels(config: Config) -> bool:
    """Whether prefetch fetches the packages of engine `venv`: where it may run with a network, and sandbox without.

    Elsewhere both run on the same machine, or where the network reaches, and sandbox need not wait for prefetch.
    """
    cluster = config.cluster
    return cluster.executor == "slurm" and not cluster.reaches_internet and "sandbox" not in cluster.on_login_node


def _as_fetched(source: Source, fetched: Mapping[str, Any]) -> Source:
    """The source, by the digest that was fetched of it, if that was of the same name."""
    if source.reference is None or fetched.get("image") != source.text:
        return source
    return replace(source, reference=replace(source.reference, digest=fetched["digest"]))


@contextlib.contextmanager
def open_sandbox(values: Mapping[str, Any], log: Path, tick: procs.Tick = lambda: None) -> Iterator[Engine]:
    """The engine that the sandbox stage's values describe, while the block runs; UserError when its files are gone.

    With `unpack_on_node` the image is unpacked on this node's own disk first, and removed in the end; `tick` is called
    a few times a second meanwhile.
    """
    _warn_of_holes(values.get("tritonserver", ""))
    folder = Path(values["path"])
    if values["engine"] == "venv":
        manifest = atomic.read_json(folder / MANIFEST)
        if manifest is None:
            raise _not_here(folder)
        yield environment.open_environment(folder, manifest)
        return
    site = Path(values["packages"]) if values.get("packages") else None
    closes = bool(values.get("closes"))
    if values["engine"] == "docker":
        yield Docker(values["path"], packages=site, closes=closes)
        return
    for part in filter(None, (folder, site)):
        if not part.exists():
            raise _not_here(part)
    image = images.Image(values["engine"], str(folder), values["digest"], built=False)
    with contextlib.ExitStack() as stack:
        if values.get("unpack_on_node"):
            owner.sweep_folders(Path(tempfile.gettempdir()), _UNPACKED)  # of servers whose whole job was killed
            prefix = f"{_UNPACKED}{owner.mark(procs.this_process())}"
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True))
            image = images.unpack(image, Path(place) / "image", log, tick)
        yield Apptainer(image.file, name=image.engine, packages=site, closes=closes)


def _warn_of_holes(version: str) -> None:
    line = advisories.warning(advisories.release_of(version))
    if line is not None:
        logger.warning("%s", line)


def _not_here(path: Path) -> UserError:
    return UserError(
        f"{path}: the sandbox is not on {os.uname().nodename}; run --force --stage sandbox, with cluster.cache "
        "(or sandbox.cache_dir) on a file system that all nodes see"
    )


def engine_of(config: Config) -> str:
    """The engine that the configuration comes to on this machine."""
    return choose_engine(config.sandbox.engine, config.cluster.engine)


def cache_dir(config: Config) -> Path:
    """`sandbox.cache_dir`, or hh-pipeline in the cluster's cache, or in the user's own."""
    if config.sandbox.cache_dir is not None:
        return Path(config.sandbox.cache_dir).expanduser().resolve()
    if config.cluster.cache is not None:
        return Path(config.cluster.cache) / "hh-pipeline"
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "hh-pipeline"


def _prepare_venv(config: Config, log: Path, note: Note) -> dict[str, Any]:
    environment.check_platform()
    pins = environment.requirements()
    cache, key = cache_dir(config), environment.environment_key(pins)
    wheels = environment.fetched(pins, cache)
    folder, manifest, built = cached(
        cache, _venv_name(pins), lambda target: environment.build(target, pins, log, note, wheels), _usable_venv
    )
    versions = {"python": manifest["python"], "tritonserver": manifest["tritonserver"]}
    return {"path": str(folder), **versions, "key": key, "built": built}


def _prepare_container(
    config: Config, engine: str, log: Path, note: Note, fresh: bool, fetched: Mapping[str, Any]
) -> dict[str, Any]:
    cache, settings = cache_dir(config), config.sandbox
    source = _as_fetched(parse_source(settings.image), fetched)
    image = images.make(source, engine, _as_folder(config), cache, log, note, fresh)
    site, installed = None, False
    if packages_bound(config):
        note("looking for the server's Python packages")
        site, installed = packages.install(environment.package_pins(settings.python), settings.python, cache, log)
    note("checking the image")
    inside = inside_argv(image, site)
    if config.serving.flavour == "torchscript":
        found = image_checks.check_backend(inside)
    else:
        found = image_checks.check_image(inside, settings.python if site else None)
    if site is not None and installed:
        note("compiling the packages")
        argv = [*inside_argv(image, site, writable=True), *packages.compile_argv()]
        # Its status says nothing: some packages have files for other Pythons. What is not compiled serves all the same.
        procs.capture(argv, env=exec_environment(os.environ, {}), timeout_s=image_checks.CHECK_S)
    return {
        "path": image.file,
        "image": source.text,
        "digest": image.digest,
        "packages": str(site) if site else None,
        "unpack_on_node": settings.unpack_on_node,
        "engine_version": images.version(engine),
        **found,
        "key": fingerprint([engine, image.digest, str(site)])[:16],
        "built": image.built or installed,
    }


def _as_folder(config: Config) -> bool:
    """Whether the cache keeps a sandbox folder; what nodes unpack for themselves is kept as one file."""
    return config.sandbox.format == "sandbox" and not config.sandbox.unpack_on_node


def packages_bound(config: Config) -> bool:
    """Whether the trainer's torch and transformers are bound into the container: a graph is served without Python."""
    return config.sandbox.packages == "trainer" and config.serving.flavour == "python"


def inside_argv(image: images.Image, site: Path | None, writable: bool = False) -> list[str]:
    """What stands before a command that shall run in the image as the server does, without GPUs and network."""
    binds = [Bind(site, packages.IN_CONTAINER, writable)] if site else []
    if image.engine == "docker":
        return docker_argv(image.file, binds, (), network=False, user=f"{os.getuid()}:{os.getgid()}")
    return exec_argv(image.engine, image.file, binds, gpus=False, own_environment=True)


def _venv_name(pins: list[str]) -> str:
    return f"server-{environment.environment_key(pins)}"


def _has_venv(cache: Path, pins: list[str], built: Mapping[str, Any]) -> bool:
    """Whether the environment is there: in the cache, for machines like this one, or as the run built it elsewhere."""
    folders = [cache / _venv_name(pins), *([Path(built["path"])] if built.get("engine") == "venv" else [])]
    manifests = [atomic.read_json(folder / MANIFEST) for folder in folders if _usable_venv(folder)]
    return any(manifest is not None and manifest["packages"] == pins for manifest in manifests)


def _usable_venv(folder: Path) -> bool:
    """Whether the interpreter that the environment was made from still exists."""
    return (folder / "bin" / "python").exists() and (folder / "tritonserver").exists()


if __name__ == "__main__":
    run_command(main)
