"""Processes that load torch and transformers: thousands of modules, which take seconds to come and to go.

On a slow core a quarter of that time is the garbage collector's, which looks at them again and again while they are
loaded, and the interpreter's end, which takes them apart one by one. A stage's work does without both.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable

from pipeline.errors import run_command
from pipeline.procs import die_with_parent


def begin() -> None:
    """To be called first, before what is heavy is imported: bind the process to its parent, and collect no garbage."""
    die_with_parent()
    gc.disable()


def run_and_leave(main: Callable[[], int | None], well: tuple[int, ...] = (0,)) -> None:
    """`run_command` for a process that called `begin`; where `main` ends with a status that is among `well`, the
    process leaves at once, without the interpreter's own end. What was loaded is never looked at for garbage."""
    gc.freeze()
    gc.enable()
    try:
        run_command(main)
    except SystemExit as end:
        if end.code in well:
            leave(int(end.code or 0))
        raise


def leave(status: int) -> None:
    """End the process with all that it has said and logged, and nothing else."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
