"""Nodes on which the run's work failed through no fault of its own: its later jobs avoid them for a week.

One file a node, so that jobs write without a lock, and deleting a file is how a person clears one.
"""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.run import atomic
from pipeline.run.directory import RunDir

KEEP_S = 7 * 24 * 3600.0
"""After so long a node counts as mended."""


@dataclass(frozen=True)
class BadNode:
    """A node, and what happened on it."""

    node: str
    reason: str
    time: float


def remember(run: RunDir, node: str, reason: str) -> None:
    """Have the run's later jobs avoid a node."""
    atomic.write_json(_file(run, node), asdict(BadNode(node, reason, time.time())))


def known(run: RunDir) -> list[BadNode]:
    """The nodes to avoid now, by name."""
    raw = [atomic.read_json(path) for path in sorted(_folder(run).glob("*.json"))]
    found = [BadNode(**one) for one in raw if one is not None]
    return [bad for bad in found if time.time() - bad.time < KEEP_S]


def forget(run: RunDir, node: str) -> None:
    """Let jobs use a node again."""
    _file(run, node).unlink(missing_ok=True)


def describe(run: RunDir, bad: BadNode) -> str:
    """One line for people."""
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(bad.time))
    file = shlex.quote(os.path.relpath(_file(run, bad.node)))
    return f"node {bad.node} is avoided since {since}: {bad.reason} (to use it again: rm {file})"


def _folder(run: RunDir) -> Path:
    return run.root / "control" / "bad-nodes"


def _file(run: RunDir, node: str) -> Path:
    return _folder(run) / f"{node}.json"
