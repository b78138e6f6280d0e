"""services/metrics.jsonl: what the reward servers did, a line every few seconds in which they were asked anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.run import atomic
from pipeline.run.directory import RunDir

PREFIX = "reward_server/"
"""What the names of these figures begin with among a training's metrics."""
_TAIL = 1 << 14


def append(run: RunDir, row: dict[str, Any]) -> None:
    """Append a row."""
    atomic.append_line(path(run), json.dumps(row))


def last(run: RunDir) -> dict[str, Any] | None:
    """The latest row, or None."""
    return _last_with(path(run), "requests")


def describe(run: RunDir) -> str:
    """What the server and its clients did last, on one line; empty where there was nothing yet."""
    server = last(run) or {}
    trained = _last_with(run.metrics, f"{PREFIX}tokens_per_second") or {}
    parts = []
    if server:
        parts += [
            f"{server['requests'] / server['seconds']:.1f} requests/s",
            f"{server['batch_mean']:.1f} sequences an execution",
            f"queue {server['queue_ms']:.1f} ms",
        ]
    if trained:
        parts.append(f"{trained[f'{PREFIX}tokens_per_second']:.0f} tokens/s")
    return "rewards: " + ", ".join(parts) if parts else ""


def path(run: RunDir) -> Path:
    """The file."""
    return run.endpoint.with_name("metrics.jsonl")


def _last_with(file: Path, key: str) -> dict[str, Any] | None:
    """The last row that has a value for `key`, looked for near the file's end."""
    if not file.exists():
        return None
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - _TAIL))
        lines = opened.read().decode("utf-8", "replace").splitlines()
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut short by a crash, or by where this began to read
        if isinstance(row, dict) and row.get(key) is not None:
            return row
    return None
