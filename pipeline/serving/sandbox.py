"""The sandbox stage: prepares what tritonserver runs in, once a machine, and keeps it in a cache for all runs.

python -m pipeline.serving.sandbox --run RUN --out DIR
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline import procs
from pipeline.config.schema import Config
from pipeline.errors import UserError, run_command
from pipeline.run import atomic
from pipeline.run.hashing import fingerprint
from pipeline.run.lock import lock
from pipeline.run.work import Progress, parse_work, write_result
from pipeline.serving import environment
from pipeline.serving.engines import Apptainer, Docker, Engine, build_argv, choose_engine, docker_image

MANIFEST = "manifest.json"
_WAIT_S = 3600.0

logger = logging.getLogger(__name__)

Builder = Callable[[Path], dict[str, Any]]
"""Fills a new folder and returns the manifest that it wrote there, last."""


def main(argv: list[str] | None = None) -> None:
    """Prepare the sandbox and record where it is."""
    _, config, out = parse_work("Prepare the sandbox that tritonserver runs in.", argv)
    progress = Progress(out, total=4, every_s=0.0)
    steps = iter(range(1, 4))

    def note(text: str) -> None:
        logger.info("%s", text)
        progress.update(next(steps, 3), text)

    values = prepare(config, out / "build.log", note)
    state = "built" if values["built"] else "found in the cache"
    logger.info("%s sandbox %s in %.1f s: %s", values["engine"], state, values["seconds"], values["path"])
    progress.update(4, state)
    write_result(out, {}, values)


def prepare(config: Config, log: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """Build the configured sandbox, or find it in the cache; return what `open_sandbox` needs.

    Raises UserError when the engine is missing or a build step fails; nothing half-built is left to be trusted.
    """
    started = time.monotonic()
    cache = cache_dir(config)
    engine = choose_engine(config.sandbox.engine)
    if engine == "none":
        raise UserError('sandbox.engine: "none" starts no server and needs no sandbox; leave this stage out of `all`')
    if engine == "venv":
        environment.check_platform()
        pins = environment.requirements()
        key = environment.environment_key(pins)
        folder, manifest, built = cached(
            cache, f"server-{key}", lambda target: environment.build(target, pins, log, note), _usable_venv
        )
        values = {"python": manifest["python"], "tritonserver": manifest["tritonserver"]}
    else:
        image = config.sandbox.image
        key = fingerprint([engine, image])[:16]
        folder, manifest, built = cached(
            cache, f"image-{key}", lambda target: _fetch_image(engine, image, target, log, note), lambda _: True
        )
        values = {"image": image, "tritonserver": manifest["tritonserver"]}
    seconds = round(time.monotonic() - started, 3)
    return {"engine": engine, "path": str(folder), **values, "key": key, "built": built, "seconds": seconds}


def open_sandbox(values: Mapping[str, Any]) -> Engine:
    """The engine that the sandbox stage's values describe; UserError when its folder is gone."""
    folder = Path(values["path"])
    manifest = atomic.read_json(folder / MANIFEST)
    if manifest is None:
        raise UserError(
            f"{folder}: the sandbox is not on {os.uname().nodename}; run --force --stage sandbox, with cluster.cache "
            "(or sandbox.cache_dir) on a file system that all nodes see"
        )
    if values["engine"] == "venv":
        return environment.open_environment(folder, manifest)
    if values["engine"] == "docker":
        return Docker(values["image"])
    return Apptainer(str(folder / "image"), name=values["engine"])


def cache_dir(config: Config) -> Path:
    """`sandbox.cache_dir`, or hh-pipeline in the cluster's cache, or in the user's own."""
    if config.sandbox.cache_dir is not None:
        return Path(config.sandbox.cache_dir).expanduser().resolve()
    if config.cluster.cache is not None:
        return Path(config.cluster.cache) / "hh-pipeline"
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "hh-pipeline"


def cached(cache: Path, name: str, build: Builder, usable: Callable[[Path], bool]) -> tuple[Path, dict[str, Any], bool]:
    """Return (folder, manifest, whether it was built now) of the cache entry `name`.

    An entry is built in a folder beside it and renamed when complete, so whatever bears the name can be trusted;
    one builder works at a time and others wait for it. What an interrupted builder left is removed by the next.
    """
    folder, building, lock_file = cache / name, cache / f"{name}.building", cache / f"{name}.lock"
    deadline = time.monotonic() + _WAIT_S
    while True:
        manifest = atomic.read_json(folder / MANIFEST)
        if manifest is not None and usable(folder):
            return folder, manifest, False
        if _held(lock_file):
            if time.monotonic() > deadline:
                raise UserError(f"{lock_file}: still held after {_WAIT_S:.0f} s; delete it if that build is gone")
            time.sleep(0.5)
            continue
        with lock(lock_file, f"building {name}"):
            if (folder / MANIFEST).exists() and usable(folder):  # another builder finished between our two looks
                continue
            shutil.rmtree(building, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
            with atomic.disk_errors(building):
                building.mkdir(parents=True)
            try:
                manifest = build(building)
                building.rename(folder)
            finally:
                shutil.rmtree(building, ignore_errors=True)
            atomic.sync_directory(cache)
            return folder, manifest, True


def _held(lock_file: Path) -> bool:
    """Whether a live process holds the lock."""
    held = atomic.read_json(lock_file)
    if held is None:
        return False
    holder = procs.ProcessId(held["host"], held["pid"], held["start"], held["boot"])
    if holder.alive():
        logger.info("waiting for process %d on %s, which is building the sandbox", holder.pid, holder.host)
        return True
    return False


def _usable_venv(folder: Path) -> bool:
    """Whether the interpreter that the environment was made from still exists."""
    return (folder / "bin" / "python").exists() and (folder / "tritonserver").exists()


def _fetch_image(engine: str, image: str, target: Path, log: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """Fetch a container image and check that its Python can serve the `python` model store flavour."""
    note(f"fetching {image}")
    environment.run_step(build_argv(engine, image, target / "image"), os.environ, log, "check sandbox.image")
    note("checking the image")
    inside = [engine, "exec", str(target / "image")]
    if engine == "docker":
        inside = ["docker", "run", "--rm", "--network=none", docker_image(image)]
    check = "import torch, transformers, numpy"
    environment.run_step(
        [*inside, "python3", "-c", check],
        os.environ,
        log,
        "sandbox.image has no torch and transformers for its Python; build one from containers/tritonserver.def",
    )
    status, text = procs.capture([*inside, "printenv", "TRITON_SERVER_VERSION"])
    manifest = {"image": image, "tritonserver": text.strip() if status == 0 else "unknown"}
    atomic.write_json(target / MANIFEST, manifest)
    return manifest


if __name__ == "__main__":
    run_command(main)
