"""Builds the virtual environment in which tritonserver runs, apart from the trainer's.

The server is the one of the nvidia-pytriton wheel (Triton 2.51, CPU and GPU, Python backend only). It needs numpy < 2,
where the trainer wants numpy 2; torch and transformers have the trainer's versions, so that both compute the same
rewards. Nothing here imports torch: versions come from package metadata.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline import procs
from pipeline.containers.steps import last_line, run_step
from pipeline.errors import UserError
from pipeline.run import atomic
from pipeline.run.build_cache import MANIFEST, cached
from pipeline.run.hashing import fingerprint
from pipeline.serving.engines import Venv

LAYOUT_VERSION = 1
"""Raised when environments that were built before must be built again."""
SERVER_WHEEL = "nvidia-pytriton==0.7.0"
SERVER_VERSION = "2.51.0"  # of the tritonserver in that wheel
NUMPY = "numpy==1.26.4"  # the wheel's Python backend returns empty tensors under numpy 2
PYTHONS = ((3, 10), (3, 11), (3, 12))  # stubs exist for 3.8-3.13, but 3.13 has no numpy < 2

WHEELS = "wheels"
_INDEX_REMEDY = "name an index that has it with PIP_INDEX_URL, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS"

logger = logging.getLogger(__name__)


def requirements() -> list[str]:
    """Exact pins: the server, and what its Python needs."""
    return sorted([*package_pins(), SERVER_WHEEL], key=lambda pin: pin.partition("==")[0])


def package_pins(python: str | None = None) -> list[str]:
    """Exact pins of torch and transformers with all that they need, as in this environment, and of an older numpy.

    `python` is the minor version that they are for, as in "3.12"; by default this interpreter's.
    """
    pins = {"numpy": NUMPY}
    target = {"python_version": python, "python_full_version": f"{python}.0"} if python is not None else {}
    waiting: list[tuple[str, frozenset[str]]] = [("torch", frozenset()), ("transformers", frozenset())]
    seen = set()
    while waiting:
        wanted, extras = waiting.pop()
        name = canonicalize_name(wanted)
        if (name, extras) in seen or name == "numpy":
            continue
        seen.add((name, extras))
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"{name}: not installed here, but the server needs it; run: pip install {name}") from None
        pins[name] = f"{name}=={distribution.version}"
        needed = [Requirement(text) for text in distribution.requires or []]
        environments = [{"extra": extra, **target} for extra in ("", *extras)]
        waiting += [
            (need.name, frozenset(need.extras))  # torch names CUDA's libraries as extras of one package
            for need in needed
            if need.marker is None or any(need.marker.evaluate(each) for each in environments)
        ]
    return [pins[name] for name in sorted(pins)]


def environment_key(pins: list[str]) -> str:
    """Identifies an environment by all that goes into it."""
    interpreter = [sys.implementation.cache_tag, platform.python_version(), sys.base_prefix]
    return fingerprint([LAYOUT_VERSION, interpreter, platform.platform(), pins])[:16]


def libpython_folder() -> Path:
    """Where the shared library of this interpreter is, which Triton's stub is linked to; UserError when it is not."""
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    name = f"libpython{minor}.so.1.0"
    multiarch = sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"
    recorded = sysconfig.get_config_var("LIBDIR")
    folders = [Path(recorded)] if recorded else []
    folders += [Path(sys.base_prefix) / "lib", Path("/usr/lib") / multiarch, Path("/usr/lib64"), Path("/usr/local/lib")]
    for folder in folders:
        if (folder / name).is_file():
            return folder
    raise UserError(
        f"sandbox: {name} not found (looked in {', '.join(map(str, folders))}), which tritonserver's Python backend "
        f"needs; install the Debian package libpython{minor}, or use a Python built with --enable-shared"
    )


def check_platform() -> None:
    """Refuse, before anything is downloaded, a machine on which the wheel cannot run."""
    if sys.version_info[:2] not in PYTHONS:
        raise UserError(
            f"sandbox.engine: venv needs Python 3.10, 3.11 or 3.12, not {platform.python_version()}; "
            "use one of them, or a container engine"
        )
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise UserError(
            f"sandbox.engine: venv needs Linux on x86-64 (the nvidia-pytriton wheel), not {platform.platform()}; "
            "use a container engine"
        )


def fetch(pins: list[str], cache: Path, log: Path, note: Callable[[str], None]) -> Path:
    """The folder of the cache with the pinned packages as wheels, from which `build` needs no network."""

    def download(target: Path) -> dict[str, Any]:
        note(f"fetching {len(pins)} packages")
        pin_file = target / "requirements.txt"
        pin_file.write_text("\n".join(pins) + "\n")
        # Not `pip download`: what has no wheel is built here, since its build takes the network too.
        argv = [sys.executable, "-m", "pip", "wheel", "--no-input", "--no-deps", f"--wheel-dir={target / WHEELS}"]
        run_step([*argv, "--requirement", str(pin_file)], _pip_environment(), log, _INDEX_REMEDY)
        manifest = {"packages": pins, "wheels": sorted(path.name for path in (target / WHEELS).iterdir())}
        atomic.write_json(target / MANIFEST, manifest)
        return manifest

    return cached(cache, _wheels_name(pins), download, _has_wheels)[0] / WHEELS


def fetched(pins: list[str], cache: Path) -> Path | None:
    """The folder that `fetch` made, where it is whole."""
    folder = cache / _wheels_name(pins)
    return folder / WHEELS if _has_wheels(folder) else None


def _wheels_name(pins: list[str]) -> str:
    """Login node and compute nodes may differ in what makes an environment's key, but not in this."""
    return f"wheels-{fingerprint([sys.implementation.cache_tag, platform.machine(), pins])[:16]}"


def _has_wheels(folder: Path) -> bool:
    manifest = atomic.read_json(folder / MANIFEST)
    return manifest is not None and all((folder / WHEELS / name).is_file() for name in manifest["wheels"])


def _pip_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}


def build(
    folder: Path, pins: list[str], log: Path, note: Callable[[str], None], wheels: Path | None = None
) -> dict[str, Any]:
    """Make the environment in the new folder `folder` and return its manifest, which it also writes, last.

    With `wheels`, a folder that `fetch` made, no network is needed.

    The folder may be moved afterwards: nothing in it that is used holds its absolute path.
    Raises UserError when a step fails; the steps' output goes to `log`.
    """
    libpython = libpython_folder()
    env = _pip_environment()
    note("creating the virtual environment")
    run_step([sys.executable, "-m", "venv", str(folder)], env, log, "install the package python3-venv")
    pin_file = folder / "requirements.txt"
    pin_file.write_text("\n".join(pins) + "\n")
    python = str(folder / "bin" / "python")
    note(f"installing {len(pins)} packages")
    # --no-deps: the list is complete, and the server wheel's own pins (an old tritonclient) are for its Python client.
    install = [python, "-m", "pip", "install", "--no-input", "--no-deps", "--requirement", str(pin_file)]
    if wheels is not None:
        install += ["--no-index", f"--find-links={wheels}"]
    run_step(install, env, log, _INDEX_REMEDY)
    note("checking the server")
    _remove_scripts(folder / "bin")
    site = Path("lib") / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    _lay_out(folder, site)
    manifest = {
        "layout": LAYOUT_VERSION,
        "python": platform.python_version(),
        "site": str(site),
        "libpython": str(libpython),
        "packages": pins,
        "tritonserver": SERVER_VERSION,
    }
    _verify(open_environment(folder, manifest))
    atomic.write_json(folder / MANIFEST, manifest)
    return manifest


def open_environment(folder: Path, manifest: Mapping[str, Any]) -> Venv:
    """The engine of a built environment."""
    libraries = (folder / manifest["site"] / "nvidia_pytriton.libs", Path(manifest["libpython"]))
    return Venv(folder, libraries)


def _lay_out(folder: Path, site: Path) -> None:
    """Give tritonserver a backend folder that holds the stub of this very Python; links are relative."""
    server = site / "pytriton" / "tritonserver"
    binary = folder / server / "bin" / "tritonserver"
    binary.chmod(binary.stat().st_mode | 0o111)
    (folder / "tritonserver").symlink_to(binary.relative_to(folder))
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = folder / server / "python_backend_stubs" / minor / "triton_python_backend_stub"
    stub.chmod(stub.stat().st_mode | 0o111)
    parts = (entry for entry in (folder / server / "backends" / "python").iterdir() if entry.is_file())
    for source in [*sorted(parts), stub]:
        (backend / source.name).symlink_to(os.path.relpath(source, backend))


def _remove_scripts(bin_folder: Path) -> None:
    """Remove pip's console scripts: their first line names the folder in which they were made."""
    for entry in bin_folder.iterdir():
        if not entry.name.startswith("python"):
            entry.unlink()


def _verify(engine: Venv) -> None:
    """Run the server and its Python once, and look for libraries that the stub lacks."""
    env = engine.tool_env(os.environ)
    _, text = procs.capture([str(engine.path / "tritonserver"), "--help"], env=env)
    if "--model-repository" not in text:  # asked for help, it exits with status 1
        raise UserError(f"sandbox: tritonserver does not run here: {last_line(text)}")
    stub = engine.path / "backends" / "python" / "triton_python_backend_stub"
    status, text = procs.capture(["ldd", str(stub)], env=env)
    missing = [line.split()[0] for line in text.splitlines() if "not found" in line]
    if missing:
        raise UserError(f"sandbox: the Python backend's stub lacks {', '.join(missing)}; install what provides it")
    check = "import torch, transformers, numpy; print(torch.ones(2).numpy().sum(), transformers.__version__)"
    status, text = procs.capture([str(engine.path / "bin" / "python"), "-I", "-c", check], env=env, timeout_s=300)
    if status != 0:
        raise UserError(f"sandbox: the server's Python cannot import torch and transformers: {last_line(text)}")
