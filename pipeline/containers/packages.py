"""Python packages for a server's image: NVIDIA's Triton has no torch for its Python, so they are bound in beside it.

They have the trainer's versions, so that server and trainer compute the same rewards, whatever the image.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipeline.containers.steps import run_step
from pipeline.run import atomic
from pipeline.run.build_cache import MANIFEST, cached
from pipeline.run.hashing import fingerprint

VARIABLE = "HH_PIPELINE_PACKAGES"
"""Names the folder inside the container; the served model puts it first on its path."""
IN_CONTAINER = "/hh-packages"

_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def install(pins: list[str], python: str, cache: Path, log: Path) -> tuple[Path, bool]:
    """(folder, whether it was made now) with the pinned packages for Python `python` ("3.12"). Needs the network.

    The image need not be there: pip fetches wheels for another Python than its own.
    """

    def build(target: Path) -> dict[str, list[str]]:
        (target / "requirements.txt").write_text("\n".join(pins) + "\n")
        argv = pip_argv(python, target)
        env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        run_step(argv, env, log, "name an index that has it with PIP_INDEX_URL, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS")
        atomic.write_json(target / MANIFEST, {"packages": pins, "python": [python]})
        return {"packages": pins}

    name = f"packages-{fingerprint([python, pins])[:16]}"
    folder, _, built = cached(cache, name, build, lambda made: is_whole(made / "site"))
    return folder / "site", built


def is_whole(site: Path) -> bool:
    """Whether all packages are there, as far as what pip wrote last of each tells: a purge takes single files."""
    manifest = atomic.read_json(site.parent / MANIFEST)
    if manifest is None:
        return False
    return len(list(site.glob("*.dist-info/RECORD"))) == len(manifest["packages"])


def compile_argv() -> list[str]:
    """Inside the container: what its Python would else do at each start, since it may not write there."""
    return ["python3", "-m", "compileall", "-q", "-j", "0", IN_CONTAINER]


def pip_argv(python: str, target: Path) -> list[str]:
    """pip's command: into target/site, wheels only, and for another Python than this one by name."""
    argv = [sys.executable, "-m", "pip", "install", "--no-input", "--no-deps", "--no-compile", "--only-binary=:all:"]
    if python != f"{sys.version_info.major}.{sys.version_info.minor}":
        argv += ["--implementation=cp", f"--python-version={python}", *(f"--platform={name}" for name in _PLATFORMS)]
    return [*argv, f"--target={target / 'site'}", "--requirement", str(target / "requirements.txt")]
