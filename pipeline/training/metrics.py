"""metrics.jsonl: one JSON object a line, each with its "step"; written by rank 0 only.

The file lies beside the checkpoints that it belongs to, so that a training that goes on after another one, with
other settings, finds its own rows. metrics.jsonl at the top of the run directory is a link to the current one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pipeline.run import atomic

Row = dict[str, Any]

METRICS = "metrics.jsonl"
"""The file's name, in the checkpoints' folder and at the top of the run directory."""


def append_row(path: Path, row: Row) -> None:
    """Append a row; numbers that JSON does not know (nan, inf) become null."""
    bad = {key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    clean = {key: None if key in bad else value for key, value in row.items()}
    atomic.append_line(path, json.dumps(clean, allow_nan=False))


def read_rows(path: Path) -> list[Row]:
    """All whole rows; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # only ever a line that was cut short; its step is done again
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def keep_rows_until(path: Path, step: int) -> None:
    """Drop what was recorded beyond `step`: a resumed training records it again."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    atomic.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
