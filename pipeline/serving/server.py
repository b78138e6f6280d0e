"""One tritonserver process: start it, see whether it is ready and right, and stop it without a trace."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from pipeline import network, procs
from pipeline.config.serving import Serving
from pipeline.errors import UserError
from pipeline.run import owner
from pipeline.serving import access, known, shared_memory, wire
from pipeline.serving.engines import Engine, ServerSpec
from pipeline.serving.model_store import Manifest

SOCKET_PORT = 8001
"""Only a part of the socket's file name: Triton appends ":port" to a unix address."""

KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
"""For a model on the CPU: glibc keeps what one forward frees for the next, which else pays for every page anew (7 % of
the demo model's time)."""

_SOCKET_PATH_LIMIT = 107  # bytes in sockaddr_un, less the final zero
_FOLDER = "hh-triton-"
"""What the names of its folders begin with, before their owner's mark."""
_PROBE_S = 2.0
_PORTS = 5
"""Ports that are tried, where any will do and others take them while the server starts."""

logger = logging.getLogger(__name__)


def make_spec(
    serving: Serving, store: Path, devices: Sequence[str], tls: Path | None = None, interface: str | None = None
) -> ServerSpec:
    """Decide where a server listens: a socket in a new 0700 folder, or a port of this node that is free now.

    `tls` is the folder of the certificates, without which no port is opened: other users reach it, on loopback too.
    Raises UserError when `serving.grpc_port` is taken: tritonserver itself would say so only after loading the model.
    """
    prefix = shared_memory.region_prefix(procs.this_process(), store)
    if serving.bind in ("loopback", "network"):
        assert tls is not None, "who can reach a port is asked for a certificate"
        address = "127.0.0.1" if serving.bind == "loopback" else network.node_address(interface)
        port, fixed = free_port(serving.grpc_port, address), serving.grpc_port != 0
        return ServerSpec(store, address, port, tuple(devices), shm_prefix=prefix, tls=tls, fixed_port=fixed)
    address, port = f"unix:{_socket_folder() / 'rm.sock'}", serving.grpc_port or SOCKET_PORT
    return ServerSpec(store, address, port, tuple(devices), shm_prefix=prefix)


def free_port(wanted: int = 0, address: str = "127.0.0.1") -> int:
    """A port of `address` that can be bound now: `wanted`, or any when that is 0."""
    try:
        return network.free_port(address, wanted)
    except OSError as error:
        raise UserError(
            f"serving.grpc_port: {wanted} cannot be bound on {address} ({error.strerror}); "
            "choose another, or 0 for a free one"
        ) from None


def _socket_folder() -> Path:
    """A new folder that only this user may enter, with room for a socket's name in the kernel's 107 bytes."""
    for base in (tempfile.gettempdir(), "/tmp"):
        folder = _new_folder(base)
        if len(os.fsencode(folder / f"rm.sock:{SOCKET_PORT:05d}")) <= _SOCKET_PATH_LIMIT:
            return folder
        folder.rmdir()
    raise UserError("serving.bind: no folder with a path short enough for a unix socket; set TMPDIR to a short path")


def _new_folder(base: str) -> Path:
    """A new 0700 folder that tells whose it is."""
    return Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{owner.mark(procs.this_process())}", dir=base))


def _sweep_folders() -> None:
    """Remove the folders of servers whose supervisor was killed."""
    for base in {tempfile.gettempdir(), "/tmp"}:
        owner.sweep_folders(Path(base), _FOLDER)


class TritonServer:
    """A tritonserver child process. Has no threads: the caller polls. May be started again after `stop`."""

    def __init__(self, engine: Engine, spec: ServerSpec, model: str, log_path: Path, env: Mapping[str, str]) -> None:
        self.engine = engine
        self.spec = spec
        tls = str(spec.tls) if spec.tls is not None else None
        self.address = wire.Address(f"{spec.grpc_address}:{spec.grpc_port}", model, tls)
        self.log_path = log_path
        self._env = dict(env)
        self._process: procs.Child | None = None
        self._client: triton.InferenceServerClient | None = None
        self._log_start = 0
        self._ports_lost = 0
        self._link_folder: Path | None = None

    @property
    def triton_host(self) -> str:
        """What TRITON_HOST must be to reach it: host:port/model, or unix:/path:port/model."""
        return str(self.address)

    @property
    def pid(self) -> int:
        """The process id of the server, or of the container engine that runs it."""
        return self._running().pid

    def start(self) -> None:
        """Start the process; it listens only once its model is loaded. Its address may be another than before.

        UserError when other users can change what it would serve, or when the port that it must have is taken.
        """
        if self._process is not None:
            raise RuntimeError("the server was started already")
        access.check(self.spec.model_repository)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        shared_memory.sweep(self.spec.shm_prefix)  # of earlier servers whose whole job was killed
        _sweep_folders()
        self.engine.sweep()
        if self.spec.socket_folder is not None:
            self.spec.socket_folder.mkdir(mode=0o700, exist_ok=True)
            self._socket().unlink(missing_ok=True)  # of a server that was killed
        else:
            self._take_port()
        spec = self._plain_spec()
        argv = self.engine.server_argv(spec)
        env = self.engine.server_env(spec, self._env if spec.devices else {**KEEP_MEMORY, **self._env})
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = procs.spawn(argv, env=env, output=log)
        logger.info("tritonserver %d started for %s", self._process.pid, self.triton_host)

    def poll(self) -> int | None:
        """The exit status once the process has ended, else None."""
        return self._running().poll()

    def ended(self) -> str | None:
        """How the process ended, with the last error that it logged; None while it runs."""
        status = self.poll()
        if status is None:
            return None
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}: {self.last_error()}"

    def ready(self) -> bool:
        """Whether the model is loaded. UserError when the process has ended instead.

        One that lost its port to another process while it loaded is started again with another, where any will do.
        """
        fault = self.ended()
        if fault is not None:
            if not self._lost_port():
                raise UserError(f"tritonserver {fault} (log: {self.log_path})")
            logger.warning("port %d was taken by another process; starting with another", self.spec.grpc_port)
            self._ports_lost += 1
            self.stop(grace_s=1.0)
            self.start()
            return False
        shared_memory.close_regions(self.spec.shm_prefix)
        return wire.is_ready(self.client(), self.address.model, _PROBE_S)

    def wait_ready(self, deadline: float) -> None:
        """Wait until the model is loaded; UserError when the process ends or time.monotonic() passes `deadline`."""
        while not self.ready():
            if time.monotonic() > deadline:
                raise UserError(
                    f"tritonserver is not ready in time: {self.last_error()}; "
                    f"raise serving.start_timeout_s (log: {self.log_path})"
                )
            time.sleep(0.1)

    def check(self, manifest: Manifest, serving: Serving) -> float:
        """Ask for the store's known answers; return the largest difference, UserError when it is too large."""
        answers = manifest.known_answers
        try:
            rewards = known.ask(self.client(), self.address, [answer.tokens for answer in answers], serving)
        except InferenceServerException as error:
            raise UserError(f"{self.triton_host}: the known-answer check failed: {wire.error_line(error)}") from error
        difference = max(abs(reward - answer.reward) for reward, answer in zip(rewards, answers, strict=True))
        if difference > manifest.answer_tolerance:
            raise UserError(
                f"{self.triton_host}: rewards are off by {difference:.3g} from the conversion's known answers "
                f"({manifest.answer_tolerance:.3g} allowed); convert again on this kind of machine"
            )
        return difference

    def client(self) -> triton.InferenceServerClient:
        """The caller's own connection to the server."""
        if self._client is None:
            self._client = wire.open_client(self.address)
        return self._client

    def stop(self, grace_s: float | None = None) -> int | None:
        """Drain and end the server with all its children and leave nothing behind. Returns its exit status."""
        if self._client is not None:
            self._client.close()
            self._client = None
        status = None
        if self._process is not None:
            status = procs.end_tree(self._process, self.spec.drain_s + 5.0 if grace_s is None else grace_s)
            self._process = None
            self.engine.clean_up(self.spec)
        shared_memory.sweep(self.spec.shm_prefix)
        if self.spec.socket_folder is not None:
            self._socket().unlink(missing_ok=True)
        if self._link_folder is not None:
            shutil.rmtree(self._link_folder, ignore_errors=True)
            self._link_folder = None
        return status

    def remove_socket_folder(self) -> None:
        """Remove the folder of the unix socket, after the last `stop`."""
        if self.spec.socket_folder is not None:
            shutil.rmtree(self.spec.socket_folder, ignore_errors=True)

    def last_error(self) -> str:
        """The last error in the log since the last start, or else its last line."""
        with contextlib.suppress(FileNotFoundError), self.log_path.open("rb") as log:
            log.seek(self._log_start)
            lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
            errors = [line for line in lines if _is_error(line)]
            if errors or lines:
                return (errors or lines)[-1]
        return "it wrote nothing"

    def _plain_spec(self) -> ServerSpec:
        """The spec with a store's path that a shell takes as one word: Triton starts its Python stub through one."""
        if re.fullmatch(r"[\w./+-]+", str(self.spec.model_repository)):
            return self.spec
        self._link_folder = _new_folder("/tmp")
        link = self._link_folder / "model_store"
        link.symlink_to(self.spec.model_repository)
        return replace(self.spec, model_repository=link)

    def _take_port(self) -> None:
        """See that the port is still free; where any will do, take another if it is not."""
        try:
            network.free_port(self.spec.grpc_address, self.spec.grpc_port)
        except OSError:
            port = free_port(self.spec.grpc_port if self.spec.fixed_port else 0, self.spec.grpc_address)
            self.spec = replace(self.spec, grpc_port=port)
            self.address = replace(self.address, url=f"{self.spec.grpc_address}:{port}")

    def _lost_port(self) -> bool:
        """Whether the process ended because its port was taken meanwhile, and another will do."""
        movable = self.spec.socket_folder is None and not self.spec.fixed_port
        return movable and self._ports_lost < _PORTS and "already in use" in self.last_error()

    def _socket(self) -> Path:
        return Path(self.address.url.removeprefix("unix:"))

    def _running(self) -> procs.Child:
        if self._process is None:
            raise RuntimeError("the server is not started")
        return self._process


def _is_error(line: str) -> bool:
    """Whether a log line tells of an error: level E, or the message that ends a failed start."""
    # The first is logged wherever there is no GPU; the second follows the line that says why.
    if "CudaDriverHelper" in line or "failed to load all models" in line:
        return False
    return " E " in line[:40] or line.lower().startswith("error")
