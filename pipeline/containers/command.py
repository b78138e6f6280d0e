"""Command lines of the container engines: pure functions. Apptainer and Singularity take the same options."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import procs
from pipeline.errors import UserError

ENGINES = ("apptainer", "singularity", "docker")
"""Container engines in the order in which "auto" prefers them."""

_PLAIN = re.compile(r"[\w./+@=-]+")
_CARRIED = (
    *("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"),
    *(procs.RUN_MARK, procs.STAGE_MARK, procs.ATTEMPT_MARK),
)
"""Variables that go into a container whose environment is otherwise its image's: the marks let its processes be found
and ended like all others of a run."""


@dataclass(frozen=True)
class Bind:
    """A file or folder of the host, and where it is in the container."""

    source: Path
    target: str
    writable: bool = False


def guarded(argv: Sequence[str]) -> list[str]:
    """The command of an engine, so that it cannot outlive the process that starts it (with `procs.spawn`)."""
    return [sys.executable, "-m", "pipeline.containers.guard", *argv]


def choose_engine(name: str, site: str | None = None, which: Callable[[str], str | None] = shutil.which) -> str:
    """Resolve `sandbox.engine`: "auto" is the site's engine, else the first container engine on PATH, else "venv".

    Raises UserError when the named engine is not installed here. The site's is not looked for: jobs may find it
    where the login node does not.
    """
    if name == "auto":
        return site or next((engine for engine in ENGINES if which(engine)), "venv")
    if name in ENGINES and name != site and which(name) is None:
        found = [engine for engine in ENGINES if which(engine)]
        raise UserError(f"sandbox.engine: {name} is not on PATH; use {' or '.join([*found, 'venv'])}, or install it")
    return name


def exec_argv(engine: str, image: str, binds: Sequence[Bind], gpus: bool, own_environment: bool) -> list[str]:
    """What stands before a command that Apptainer or Singularity shall run in a container, in the foreground.

    `own_environment` gives it the image's environment and no home folder: nothing of the host's Python gets in.
    """
    argv = [engine, "exec"]
    if gpus:
        argv.append("--nv")
    if own_environment:
        argv += ["--cleanenv", "--no-home", "--pwd", "/"]
    for bind in binds:
        argv += _bind_arguments(bind)
    return [*argv, image]


def exec_environment(environ: Mapping[str, str], inside: Mapping[str, str]) -> dict[str, str]:
    """The environment of Apptainer or Singularity that gives a container, cleaned otherwise, the variables `inside`.

    Each engine reads its own prefix, and some versions the other's too: both are set, to the same.
    """
    carried = {name: environ[name] for name in _CARRIED if name in environ}
    env = {key: value for key, value in environ.items() if not key.startswith(("APPTAINERENV_", "SINGULARITYENV_"))}
    for key, value in {**carried, **inside}.items():
        env[f"APPTAINERENV_{key}"] = env[f"SINGULARITYENV_{key}"] = value
    return env


def build_argv(engine: str, source: str, target: Path, folder: bool) -> list[str]:
    """The command that makes a .sif file, or a sandbox folder, of `source` (see `pipeline.containers.source`)."""
    # --fix-perms: some images have folders that their owner may not delete.
    kind = ["--sandbox", "--fix-perms"] if folder else []
    return [engine, "build", *kind, "--disable-cache", str(target), source]


def docker_argv(image: str, binds: Sequence[Bind], gpus: Sequence[str], network: bool, user: str) -> list[str]:
    """What stands before a command that docker shall run, as `user` ("uid:gid")."""
    argv = ["docker", "run", "--rm", "--init", "--ipc=host", f"--user={user}"]
    argv += ["--network=host" if network else "--network=none"]
    if gpus:
        argv += ["--gpus", f'"device={",".join(gpus)}"']  # the quotes are docker's own: the value is CSV
    for bind in binds:
        mode = "" if bind.writable else ",readonly"
        argv += ["--mount", f"type=bind,{_csv(f'source={bind.source}')},{_csv(f'target={bind.target}')}{mode}"]
    return [*argv, image]


def _bind_arguments(bind: Bind) -> list[str]:
    """--bind, which every version has; for names in which it would see a separator --mount, which takes any."""
    if _PLAIN.fullmatch(str(bind.source)) and _PLAIN.fullmatch(bind.target):
        return ["--bind", f"{bind.source}:{bind.target}" + ("" if bind.writable else ":ro")]
    mode = "" if bind.writable else ",ro"
    return ["--mount", f"type=bind,{_csv(f'source={bind.source}')},{_csv(f'destination={bind.target}')}{mode}"]


def _csv(field: str) -> str:
    """A field of a comma-separated list, quoted where it must be (RFC 4180)."""
    return '"' + field.replace('"', '""') + '"' if re.search(r'[",\n]', field) else field
