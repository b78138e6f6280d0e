"""What a server has done, by its own count and by its clients'. Triton knows nothing of tokens; its clients do."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import tritonclient.grpc as triton


@dataclass(frozen=True)
class Usage:
    """A server's counts since its start."""

    requests: int = 0
    failed: int = 0
    sequences: int = 0
    executions: int = 0
    """Calls of the model; with dynamic batching one may hold several requests."""
    queue_s: float = 0.0
    """Sum over requests of the time that they waited."""
    compute_s: float = 0.0
    """Sum over requests of the time that the model worked on them."""

    def since(self, before: Usage) -> Usage:
        """What came after `before`."""
        return Usage(**{each.name: getattr(self, each.name) - getattr(before, each.name) for each in fields(Usage)})

    def row(self, seconds: float) -> dict[str, Any]:
        """Counts and means over a time of `seconds`, as JSON types."""
        return {
            "seconds": round(seconds, 3),
            "requests": self.requests,
            "failed": self.failed,
            "sequences": self.sequences,
            "executions": self.executions,
            "batch_mean": round(self.sequences / max(1, self.executions), 3),
            "queue_ms": round(1e3 * self.queue_s / max(1, self.requests), 3),
            "compute_ms": round(1e3 * self.compute_s / max(1, self.requests), 3),
        }


def read_usage(client: triton.InferenceServerClient, model: str, timeout_s: float) -> Usage:
    """Ask a server for its counts. Raises what tritonclient raises."""
    (stats,) = client.get_inference_statistics(model, client_timeout=timeout_s).model_stats
    told = stats.inference_stats
    return Usage(
        requests=told.success.count,
        failed=told.fail.count,
        sequences=stats.inference_count,
        executions=stats.execution_count,
        queue_s=told.queue.ns / 1e9,
        compute_s=(told.compute_input.ns + told.compute_infer.ns + told.compute_output.ns) / 1e9,
    )


@dataclass(frozen=True)
class Traffic:
    """What one client asked for in a time."""

    requests: int = 0
    sequences: int = 0
    tokens: int = 0
    padded: int = 0
    """Tokens with the padding that makes a request's rows equally long; most models compute none of it."""
    latency_s: float = 0.0
    """Sum over requests."""
    busy_s: float = 0.0
    """Time in which a request was under way."""
    in_flight: int = 0
    """The most that were under way at once."""


def traffic_row(clients: Sequence[Traffic]) -> dict[str, float]:
    """Figures of all clients together, by name; empty when none asked for anything."""
    asked = [client for client in clients if client.requests]
    if not asked:
        return {}
    requests = sum(client.requests for client in asked)
    return {
        "requests": requests,
        "sequences": sum(client.sequences for client in asked),
        "tokens_per_second": sum(client.tokens / client.busy_s for client in asked if client.busy_s),
        "wire_padding": 1.0 - sum(client.tokens for client in asked) / sum(client.padded for client in asked),
        "latency_ms": 1e3 * sum(client.latency_s for client in asked) / requests,
        "in_flight": max(client.in_flight for client in asked),
    }


class Meter:
    """Counts a client's requests; used by its worker threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total = Traffic()
        self._under_way = 0
        self._since = 0.0

    @contextlib.contextmanager
    def request(self, lengths: Sequence[int]) -> Iterator[None]:
        """Count a request while the block waits for its answer."""
        started = time.monotonic()
        with self._lock:
            if self._under_way == 0:
                self._since = started
            self._under_way += 1
            most = max(self._total.in_flight, self._under_way)
            self._add(in_flight=most - self._total.in_flight)
        try:
            yield
        finally:
            now = time.monotonic()
            with self._lock:
                self._under_way -= 1
                self._add(
                    requests=1,
                    sequences=len(lengths),
                    tokens=sum(lengths),
                    padded=len(lengths) * max(lengths),
                    latency_s=now - started,
                    busy_s=0.0 if self._under_way else now - self._since,
                )

    def take(self) -> Traffic:
        """What was counted since the last call."""
        with self._lock:
            taken, self._total = self._total, Traffic(in_flight=self._under_way)
            return taken

    def _add(self, **more: float) -> None:
        values = {each.name: getattr(self._total, each.name) for each in fields(Traffic)}
        self._total = Traffic(**{name: value + more.get(name, 0) for name, value in values.items()})
