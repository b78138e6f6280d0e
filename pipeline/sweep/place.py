"""A point of a sweep and where it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.config.schema import Config
from pipeline.run.directory import RunDir
from pipeline.sweep.points import STOP, Point

ENDED_BY_HAND = 130
"""The exit status of a command that a Ctrl-C or pipeline.cancel has ended."""


class SubmitOne(Protocol):
    """What submits one run, and follows it unless told not to; returns the command's exit status."""

    def __call__(
        self, run_dir: Path, config: Config, selected: Sequence[str], forced: Sequence[str], no_follow: bool
    ) -> int: ...


@dataclass(frozen=True)
class Place:
    """A point with its folder and its checked configuration."""

    point: Point
    folder: Path
    config: Config
    selected: tuple[str, ...]
    forced: tuple[str, ...] = ()
    """Those of them that run even where they are up to date."""

    @property
    def run(self) -> RunDir:
        return RunDir(Path(os.path.abspath(self.folder)))


def is_cancelled(folder: Path) -> bool:
    """Whether pipeline.cancel has ended the sweep in the meantime; says so."""
    if not (folder / STOP).exists():
        return False
    print("pipeline.cancel has ended the sweep: nothing else is submitted; the same command goes on", file=sys.stderr)
    return True
