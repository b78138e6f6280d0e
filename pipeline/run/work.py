"""What a stage's work writes for the runner, from any process and without the control plane.

A work command gets `--run RUN --out DIR`: it reads RUN/config.yaml and other stages' artifacts, writes its own
artifacts below DIR, reports progress, and ends by writing DIR/result.json. The runner then records outputs.json.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path
from typing import Any

from pipeline.config.load import read_config
from pipeline.config.schema import Config
from pipeline.run import atomic
from pipeline.run.directory import RunDir

RESULT = "result.json"
PROGRESS = "progress.json"
FORCED = "HH_PIPELINE_FORCED"
"""Environment variable of a work that runs because of --force."""


def parse_work(description: str, argv: list[str] | None = None) -> tuple[RunDir, Config, Path]:
    """Parse a work command's arguments, set up logging and read the run's configuration."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--run", type=Path, required=True, help="the run directory")
    parser.add_argument("--out", type=Path, required=True, help="the folder that the artifacts are written to")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    arguments.out.mkdir(parents=True, exist_ok=True)
    return RunDir(arguments.run.resolve()), read_config(arguments.run), arguments.out.resolve()


def forced() -> bool:
    """Whether this attempt was asked for by --force, and must not be content with what an earlier one found."""
    return bool(os.environ.get(FORCED))


def write_result(out: Path, artifacts: dict[str, str], values: dict[str, Any] | None = None) -> None:
    """Record what was made: artifact name to path relative to `out`, and JSON values worth showing."""
    for name, path in artifacts.items():
        if not (out / path).exists():
            raise FileNotFoundError(f"artifact {name}: {out / path} was not written")
    atomic.write_json(out / RESULT, {"artifacts": artifacts, "values": values or {}})


class Progress:
    """Writes out/progress.json at most every `every_s` seconds: {"step", "total", "note"}; followers show it."""

    def __init__(self, out: Path, total: int, every_s: float = 0.5) -> None:
        self._path = out / PROGRESS
        self._total = total
        self._every_s = every_s
        self._written = float("-inf")

    def update(self, step: int, note: str = "") -> None:
        """Report that `step` of the total is done."""
        now = time.monotonic()
        if step < self._total and now - self._written < self._every_s:
            return
        self._written = now
        atomic.write_json(self._path, {"step": step, "total": self._total, "note": note})
