"""Steps of a build: commands with a log, whose failure is one line."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from pipeline import procs
from pipeline.errors import UserError

_GUARD = "pipeline.containers.guard"


def run_step(argv: list[str], env: Mapping[str, str], log: Path, remedy: str, tick: procs.Tick = lambda: None) -> None:
    """Run a step with its output appended to `log`; a failure names the last line that it wrote."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        start = output.tell()
        process = procs.spawn(argv, env=env, output=output)
        try:
            while process.poll() is None:
                tick()
                time.sleep(0.05)
        except BaseException:
            procs.end_tree(process, grace_s=2.0)
            raise
    if process.returncode != 0:
        shown = " ".join(argv[argv.index(_GUARD) + 1 :][:3] if _GUARD in argv else argv[:4])
        with log.open("rb") as written:
            written.seek(start)
            text = written.read().decode("utf-8", "replace")
        raise UserError(f"{shown} failed: {last_line(text)}; {remedy} (log: {log})")


def last_line(text: str) -> str:
    """The last line that tells of an error, or else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "fatal"))]
    return (errors or lines or ["no output"])[-1]
