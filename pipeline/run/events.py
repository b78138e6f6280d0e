"""events.jsonl: every change of state, with its reason; append-only."""

from __future__ import annotations

import json
import time
from typing import Any

from pipeline.run import atomic
from pipeline.run.directory import RunDir


def record(run: RunDir, event: str, **details: Any) -> None:
    """Append one event."""
    line = {"time": round(time.time(), 3), "event": event, **details}
    atomic.append_line(run.events, json.dumps(line, ensure_ascii=False))


def read(run: RunDir) -> list[dict[str, Any]]:
    """All events; a last line that a crash cut short is left out."""
    if not run.events.exists():
        return []
    events = []
    for line in run.events.read_text("utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
