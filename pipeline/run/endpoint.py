"""services/triton.json: where the reward servers are, and which model they serve.

A training may have several: triton.json is the first one's, triton-1.json the second's, and so on. While one of them
changes over to another model, its earlier self is triton-0-retiring.json.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.run import atomic
from pipeline.run.directory import RunDir

WAIT_VARIABLE = "HH_PIPELINE_TRITON_WAIT_S"
"""Seconds for which clients wait for the endpoint to be published; a job that starts server and clients sets it."""
EXPECTED_S = 120.0
"""How long a job's word holds that the server will come: see `expect`."""


@dataclass(frozen=True)
class Endpoint:
    """A published reward server; the file is written once a known-answer inference has passed, mode 0600."""

    triton_host: str
    """host:port/model, or unix:/path/to/socket:port/model."""
    model: str
    version: str
    digest: str
    """Identity of the model store: its manifest's `identity`."""
    job_id: str
    host: str
    pid: int
    restarts: int = 0
    started: float = 0.0
    heartbeat: float = 0.0
    index: int = 0
    """Which of the run's servers it is."""
    tls: str = ""
    """The folder with the client's certificate, where the server asks for one."""
    retiring: bool = False
    """Whether a server of another model has taken its place, and it only serves those who still use its own."""


def publish(run: RunDir, endpoint: Endpoint) -> None:
    """Write the endpoint and, for the first server, the triton.env that a person can `source`."""
    atomic.private_folder(run.endpoint.parent)
    atomic.write_json(_file_of(run, endpoint), asdict(endpoint), mode=0o600)
    if endpoint.index == 0 and not endpoint.retiring:
        lines = [f"export TRITON_HOST={shlex.quote(endpoint.triton_host)}"]
        if endpoint.tls:
            lines.append(f"export TRITON_TLS={shlex.quote(endpoint.tls)}")
        atomic.write_text(env_file(run), "\n".join(lines) + "\n", mode=0o600)


def beat(run: RunDir, endpoint: Endpoint) -> None:
    """Renew the heartbeat of a published endpoint, unless another server has taken its place."""
    if not replaced(run, endpoint):
        atomic.write_json(_file_of(run, endpoint), {**asdict(endpoint), "heartbeat": time.time()}, mode=0o600)


def replaced(run: RunDir, endpoint: Endpoint) -> bool:
    """Whether another server is published in this one's place: its job was given up for lost and started elsewhere."""
    found = read(run, endpoint.index, endpoint.retiring)
    return found is not None and (found.host, found.pid) != (endpoint.host, endpoint.pid)


def withdraw(run: RunDir, index: int | None = None, retiring: bool = False) -> None:
    """Remove the endpoint of a server that stops; without an index, those of all."""
    doomed = _files(run) if index is None else [path(run, index, retiring)]
    if index in (None, 0) and not retiring:
        doomed.append(env_file(run))
    for file in doomed:
        file.unlink(missing_ok=True)


def read(run: RunDir, index: int = 0, retiring: bool = False) -> Endpoint | None:
    """A published endpoint, or None."""
    raw: dict[str, Any] | None = atomic.read_json(path(run, index, retiring))
    return Endpoint(**raw) if raw is not None else None


def read_all(run: RunDir) -> list[Endpoint]:
    """All published endpoints, by index; those that retire come last."""
    found = (atomic.read_json(file) for file in _files(run))
    return sorted((Endpoint(**raw) for raw in found if raw is not None), key=lambda one: (one.retiring, one.index))


def expect(run: RunDir) -> None:
    """Say that the server will come, or come back: its job waits in the queue or runs. To be renewed."""
    atomic.private_folder(run.endpoint.parent)
    atomic.write_json(_expected_file(run), {"time": time.time()})


def expected(run: RunDir) -> bool:
    """Whether a job has said so lately."""
    said = atomic.read_json(_expected_file(run))
    return said is not None and time.time() - float(said["time"]) < EXPECTED_S


def path(run: RunDir, index: int, retiring: bool = False) -> Path:
    """The file of the server with this index."""
    if retiring:
        return run.endpoint.with_name(f"triton-{index}-retiring.json")
    return run.endpoint if index == 0 else run.endpoint.with_name(f"triton-{index}.json")


def _file_of(run: RunDir, endpoint: Endpoint) -> Path:
    return path(run, endpoint.index, endpoint.retiring)


def env_file(run: RunDir) -> Path:
    """The shell form of the first endpoint."""
    return run.endpoint.with_name("triton.env")


def _files(run: RunDir) -> list[Path]:
    others = run.endpoint.parent.glob("triton-*.json")
    return [file for file in (run.endpoint, *others) if file.exists()]


def _expected_file(run: RunDir) -> Path:
    return run.endpoint.with_name("expected.json")
