"""The one exception that a person is meant to read."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Bad input or a broken environment: one line that says where, what is wrong and what to do.

    Commands print it without a traceback and exit with status 2. Anything else that escapes is a bug
    and keeps its traceback.
    """


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the valid word closest to `word`, or "" when none is close."""
    matches = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main function; turn a UserError into one line on stderr and exit status 2.

    Nothing that it makes may be written by every user: what lies in a run directory is executed.
    """
    os.umask(os.umask(0o077) | 0o002)
    try:
        status = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # `... | head` closed the pipe
        sys.stderr.close()
        status = 141
    logging.shutdown()
    sys.exit(status)
