"""How tritonserver is started: from a virtual environment, or in a container. Pure functions of their arguments."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError

CONTAINERS = ("apptainer", "singularity", "docker")
"""Container engines in the order in which "auto" prefers them."""
STORE_IN_CONTAINER = "/model_store"

_FOREIGN_PYTHON = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


@dataclass(frozen=True)
class ServerSpec:
    """What one tritonserver process serves, and where."""

    model_repository: Path
    grpc_address: str
    """"127.0.0.1", or "unix:/path/to/socket" (Triton appends ":" and the port to the file's name)."""
    grpc_port: int
    devices: tuple[str, ...] = ()
    """What CUDA_VISIBLE_DEVICES is set to; empty hides every GPU."""
    shm_prefix: str = "triton_python_backend_shm_region_"
    """How the server's regions in /dev/shm are named, so that they can be swept when it was killed."""
    tls: Path | None = None
    """Folder of the certificates (see `pipeline.serving.tls`); None: no TLS."""
    drain_s: int = 30
    verbose: int = 0

    @property
    def socket_folder(self) -> Path | None:
        """The folder of the unix socket, or None with TCP."""
        return Path(self.grpc_address.removeprefix("unix:")).parent if self.grpc_address.startswith("unix:") else None


def server_flags(spec: ServerSpec, repository: str) -> list[str]:
    """tritonserver's arguments: gRPC only, one fixed model, no configuration guessing, no HTTP, no metrics port."""
    return [
        f"--model-repository={repository}",
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        f"--grpc-address={spec.grpc_address}",
        f"--grpc-port={spec.grpc_port}",
        "--allow-http=false",
        "--allow-metrics=false",
        f"--backend-config=python,shm-region-prefix-name={spec.shm_prefix}",
        f"--exit-timeout-secs={spec.drain_s}",
        "--log-format=ISO8601",
        f"--log-verbose={spec.verbose}",
        *_tls_flags(spec.tls),
    ]


def _tls_flags(folder: Path | None) -> list[str]:
    """Mutual TLS: who has no certificate of this run is not answered."""
    if folder is None:
        return []
    files = {"grpc-server-cert": "server.pem", "grpc-server-key": "server.key", "grpc-root-cert": "ca.pem"}
    return ["--grpc-use-ssl-mutual=true", *(f"--{flag}={folder / file}" for flag, file in files.items())]


class Engine(ABC):
    """Turns a ServerSpec into a command line and its environment."""

    name: str

    @abstractmethod
    def server_argv(self, spec: ServerSpec) -> list[str]:
        """The command that runs tritonserver in the foreground."""

    @abstractmethod
    def server_env(self, spec: ServerSpec, environ: Mapping[str, str]) -> dict[str, str]:
        """The command's whole environment, made from the caller's."""


@dataclass(frozen=True)
class Venv(Engine):
    """The tritonserver of the nvidia-pytriton wheel, in a virtual environment of its own."""

    path: Path
    linker_folders: tuple[Path, ...]
    """Folders of the server's bundled libraries and of libpython."""
    name: str = "venv"

    def server_argv(self, spec: ServerSpec) -> list[str]:
        return [
            str(self.path / "tritonserver"),
            f"--backend-directory={self.path / 'backends'}",
            *server_flags(spec, str(spec.model_repository)),
        ]

    def server_env(self, spec: ServerSpec, environ: Mapping[str, str]) -> dict[str, str]:
        env = self.tool_env(environ)
        env["CUDA_VISIBLE_DEVICES"] = ",".join(spec.devices)
        return env

    def tool_env(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The environment in which the server's programs find their own libraries and Python, and no others."""
        env = {key: value for key, value in environ.items() if key not in _FOREIGN_PYTHON}
        # The stub of the Python backend takes its packages from the first python3 on PATH.
        env["PATH"] = os.pathsep.join([str(self.path / "bin"), environ.get("PATH", os.defpath)])
        libraries = [str(folder) for folder in self.linker_folders]
        env["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *filter(None, [environ.get("LD_LIBRARY_PATH")])])
        return env


@dataclass(frozen=True)
class Apptainer(Engine):
    """Apptainer or Singularity: the same options under two names."""

    image: str
    """A sandbox folder or a .sif file."""
    name: str = "apptainer"

    def server_argv(self, spec: ServerSpec) -> list[str]:
        return [*self.exec_argv(spec), "tritonserver", *server_flags(spec, STORE_IN_CONTAINER)]

    def exec_argv(self, spec: ServerSpec) -> list[str]:
        """The engine's own part of the command: GPUs, and nothing of the host but the store and the socket."""
        binds = ["--bind", f"{spec.model_repository}:{STORE_IN_CONTAINER}:ro"]
        if spec.socket_folder is not None:
            binds += ["--bind", f"{spec.socket_folder}:{spec.socket_folder}"]
        if spec.tls is not None:
            binds += ["--bind", f"{spec.tls}:{spec.tls}:ro"]
        return [self.name, "exec", "--nv", "--cleanenv", "--no-home", *binds, self.image]

    def server_env(self, spec: ServerSpec, environ: Mapping[str, str]) -> dict[str, str]:
        env = dict(environ)
        inside = {"CUDA_VISIBLE_DEVICES": ",".join(spec.devices)}
        for key in ("OMP_NUM_THREADS",):
            if key in environ:
                inside[key] = environ[key]
        for key, value in inside.items():  # either engine reads either prefix only in some versions: set both
            env[f"APPTAINERENV_{key}"] = value
            env[f"SINGULARITYENV_{key}"] = value
        return env


@dataclass(frozen=True)
class Docker(Engine):
    """Docker, as the calling user, without a network where a unix socket is used."""

    image: str
    name: str = "docker"
    user: str = ""
    """"uid:gid"; empty takes the calling process's."""

    def server_argv(self, spec: ServerSpec) -> list[str]:
        user = self.user or f"{os.getuid()}:{os.getgid()}"
        argv = ["docker", "run", "--rm", "--init", "--ipc=host", f"--user={user}"]
        argv += ["--network=none" if spec.socket_folder is not None else "--network=host"]
        if spec.devices:
            argv += ["--gpus", f'"device={",".join(spec.devices)}"']  # the quotes are docker's own: the value is CSV
        argv += ["--volume", f"{spec.model_repository}:{STORE_IN_CONTAINER}:ro"]
        if spec.socket_folder is not None:
            argv += ["--volume", f"{spec.socket_folder}:{spec.socket_folder}"]
        if spec.tls is not None:
            argv += ["--volume", f"{spec.tls}:{spec.tls}:ro"]
        return [*argv, docker_image(self.image), "tritonserver", *server_flags(spec, STORE_IN_CONTAINER)]

    def server_env(self, spec: ServerSpec, environ: Mapping[str, str]) -> dict[str, str]:
        return dict(environ)  # the container's own environment comes from its image and from --gpus


def choose_engine(name: str, which: Callable[[str], str | None] = shutil.which) -> str:
    """Resolve `sandbox.engine`: "auto" takes the first container engine on PATH, else "venv".

    Raises UserError when the named engine is not installed.
    """
    if name == "auto":
        return next((engine for engine in CONTAINERS if which(engine)), "venv")
    if name in CONTAINERS and which(name) is None:
        found = [engine for engine in CONTAINERS if which(engine)]
        raise UserError(f"sandbox.engine: {name} is not on PATH; use {' or '.join([*found, 'venv'])}, or install it")
    return name


def build_argv(name: str, image: str, target: Path) -> list[str]:
    """The command that fetches `image`; Singularity and Apptainer unpack it into the folder `target`."""
    if name == "docker":
        return ["docker", "pull", docker_image(image)]
    if name in ("apptainer", "singularity"):
        return [name, "build", "--sandbox", str(target), image]
    raise ValueError(f"{name} builds no image")


def docker_image(image: str) -> str:
    """The image's name as docker writes it, without the docker:// of Singularity."""
    return image.removeprefix("docker://")
