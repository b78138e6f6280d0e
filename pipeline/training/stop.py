"""Asking the trainer to save and stop: SIGTERM, SIGUSR1 or SIGUSR2 (Slurm's --signal), or the run's STOP flag."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

EX_TEMPFAIL = 75
"""Exit status of a training that saved and stopped before its end; it is to be started again."""
STOPPED = "stopped.json"
"""Written below OUT then, with the step that was saved: launchers do not pass their processes' exit status on."""


class StopRequest:
    """Remembers a signal and looks at the flags; made in the main thread."""

    def __init__(self, *flags: Path) -> None:
        self._flags = flags
        self._signalled = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._remember)

    def __bool__(self) -> bool:
        return self._signalled or any(flag.exists() for flag in self._flags)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
