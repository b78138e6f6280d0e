"""services/triton.json: where the reward server is, and which model it serves."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.run import atomic
from pipeline.run.directory import RunDir

WAIT_VARIABLE = "HH_PIPELINE_TRITON_WAIT_S"
"""Seconds for which clients wait for the endpoint to be published; a job that starts server and clients sets it."""


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


def publish(run: RunDir, endpoint: Endpoint) -> None:
    """Write triton.json and the triton.env that a person can `source`."""
    atomic.write_json(run.endpoint, asdict(endpoint), mode=0o600)
    atomic.write_text(env_file(run), f"export TRITON_HOST={endpoint.triton_host}\n", mode=0o600)


def beat(run: RunDir, endpoint: Endpoint) -> None:
    """Renew the heartbeat of a published endpoint."""
    atomic.write_json(run.endpoint, {**asdict(endpoint), "heartbeat": time.time()}, mode=0o600)


def withdraw(run: RunDir) -> None:
    """Remove the endpoint when its server stops."""
    for path in (run.endpoint, env_file(run)):
        path.unlink(missing_ok=True)


def read(run: RunDir) -> Endpoint | None:
    """The published endpoint, or None."""
    raw: dict[str, Any] | None = atomic.read_json(run.endpoint)
    return Endpoint(**raw) if raw is not None else None


def env_file(run: RunDir) -> Path:
    """The shell form of the endpoint."""
    return run.endpoint.with_name("triton.env")
