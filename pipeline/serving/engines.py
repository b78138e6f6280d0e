"""How tritonserver is started: from a virtual environment, or in a container."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import procs
from pipeline.containers import docker
from pipeline.containers.command import Bind, docker_argv, exec_argv, exec_environment, guarded
from pipeline.containers.packages import IN_CONTAINER, VARIABLE
from pipeline.run.owner import mark

STORE_IN_CONTAINER = "/model_store"
TLS_IN_CONTAINER = "/hh-tls"

_FOREIGN_PYTHON = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
_NOT_FOR_A_SERVER = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"),
    "AIP_MODE",  # a value of it opens Vertex AI's HTTP port on every address
)

_PRIVATELY = ("sh", "-c", 'umask 077; exec "$@"', "sh")
"""Stands before tritonserver: what it makes is its user's alone. Not every engine hands our umask on."""

_CLOSED = "--grpc-restricted-protocol=shared-memory,model-repository,trace,logging:Closed=nobody"
"""Closes what no client needs: shared memory, model control, and the settings of traces and logs. What would open it is
a header with an upper-case letter in its name, which HTTP/2 does not carry: there is no secret that `ps` could show."""


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
    fixed_port: bool = False
    """Whether no other port will do."""
    drain_s: int = 30
    verbose: int = 0

    @property
    def socket_folder(self) -> Path | None:
        """The folder of the unix socket, or None with TCP."""
        return Path(self.grpc_address.removeprefix("unix:")).parent if self.grpc_address.startswith("unix:") else None


def server_flags(spec: ServerSpec, closes: bool) -> list[str]:
    """tritonserver's arguments: gRPC only, one fixed model, no configuration guessing, no HTTP, no metrics port.

    `closes`: the server knows the option that closes parts of its gRPC service (from release 23.04 on).
    """
    return [
        f"--model-repository={spec.model_repository}",
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
        *([_CLOSED] if closes else []),
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

    def sweep(self) -> None:  # noqa: B027
        """Before a start: remove what servers left on this node whose jobs were killed."""

    def clean_up(self, spec: ServerSpec) -> None:  # noqa: B027
        """After the command has ended, killed perhaps: remove what outlives it."""


@dataclass(frozen=True)
class Venv(Engine):
    """The tritonserver of the nvidia-pytriton wheel, in a virtual environment of its own."""

    path: Path
    linker_folders: tuple[Path, ...]
    """Folders of the server's bundled libraries and of libpython."""
    name: str = "venv"

    def server_argv(self, spec: ServerSpec) -> list[str]:
        program = [str(self.path / "tritonserver"), f"--backend-directory={self.path / 'backends'}"]
        return [*_PRIVATELY, *program, *server_flags(spec, closes=True)]

    def server_env(self, spec: ServerSpec, environ: Mapping[str, str]) -> dict[str, str]:
        env = self.tool_env(environ)
        env["CUDA_VISIBLE_DEVICES"] = ",".join(spec.devices)
        return {key: value for key, value in env.items() if key not in _NOT_FOR_A_SERVER}

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
    packages: Path | None = None
    """Folder of Python packages that are bound in beside the image's own."""
    closes: bool = False
    """See `server_flags`."""

    def server_argv(self, spec: ServerSpec) -> list[str]:
        start = exec_argv(self.name, self.image, _binds(spec, self.packages), bool(spec.devices), own_environment=True)
        return guarded([*start, *_PRIVATELY, "tritonserver", *server_flags(_inside(spec), self.closes)])

    def server_env(self, spec: ServerSpec, environ: Mapping[str, str]) -> dict[str, str]:
        inside = {"CUDA_VISIBLE_DEVICES": ",".join(spec.devices), **_packages_variable(self.packages)}
        return exec_environment(environ, inside)


@dataclass(frozen=True)
class Docker(Engine):
    """Docker, as the calling user, without a network where a unix socket is used."""

    image: str
    name: str = "docker"
    user: str = ""
    """"uid:gid"; empty takes the calling process's."""
    packages: Path | None = None
    closes: bool = False

    def server_argv(self, spec: ServerSpec) -> list[str]:
        user = self.user or f"{os.getuid()}:{os.getgid()}"
        start = docker_argv(
            docker_image(self.image), _binds(spec, self.packages), spec.devices, spec.socket_folder is None, user
        )
        options = [f"--env={key}={value}" for key, value in _packages_variable(self.packages).items()]
        options += docker.identity(self._name(spec))
        program = [*_PRIVATELY, "tritonserver", *server_flags(_inside(spec), self.closes)]
        return guarded([*start[:-1], *options, start[-1], *program])

    def server_env(self, spec: ServerSpec, environ: Mapping[str, str]) -> dict[str, str]:
        return dict(environ)  # the container's own environment comes from its image and from --gpus

    def sweep(self) -> None:
        docker.sweep()

    def clean_up(self, spec: ServerSpec) -> None:
        docker.remove(self._name(spec))

    def _name(self, spec: ServerSpec) -> str:
        """One name for all starts of a server, which nobody else's has."""
        return f"{mark(procs.this_process())}{spec.shm_prefix.strip('_').rpartition('_')[2]}"


def docker_image(image: str) -> str:
    """The image's name as docker writes it, without the docker:// of Singularity."""
    return image.removeprefix("docker://")


def _binds(spec: ServerSpec, packages: Path | None) -> list[Bind]:
    """What a server's container sees of the host: its store, its socket, its certificates and its packages."""
    binds = [Bind(spec.model_repository, STORE_IN_CONTAINER)]
    if spec.socket_folder is not None:
        binds.append(Bind(spec.socket_folder, str(spec.socket_folder), writable=True))
    if spec.tls is not None:
        binds.append(Bind(spec.tls, TLS_IN_CONTAINER))
    if packages is not None:
        binds.append(Bind(packages, IN_CONTAINER))
    return binds


def _inside(spec: ServerSpec) -> ServerSpec:
    """The spec as it reads in a container."""
    tls = Path(TLS_IN_CONTAINER) if spec.tls is not None else None
    return replace(spec, model_repository=Path(STORE_IN_CONTAINER), tls=tls)


def _packages_variable(packages: Path | None) -> dict[str, str]:
    return {VARIABLE: IN_CONTAINER} if packages is not None else {}
