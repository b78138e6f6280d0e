"""One line of error for all ranks: they mostly fail for the same reason, and a person wants to read it once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.errors import UserError
from pipeline.heavy import run_and_leave
from pipeline.training.stop import EX_TEMPFAIL

SAID = "HH_PIPELINE_SAID"
"""Environment variable with a folder that the ranks of one launch share: a file there for every line of error."""
USER_ERROR = 2
"""Exit status of a command that ended with its one line of error."""


@contextlib.contextmanager
def shared_folder() -> Iterator[None]:
    """Give the processes that are started meanwhile a folder to agree in; the launcher's part."""
    with tempfile.TemporaryDirectory(prefix="hh-pipeline-", ignore_cleanup_errors=True) as folder:
        os.environ[SAID] = folder
        try:
            yield
        finally:
            del os.environ[SAID]


def first_to_say(line: str) -> bool:
    """Whether no other rank of this launch has said `line` before; True without a launcher."""
    folder = os.environ.get(SAID)
    if folder is None:
        return True
    try:
        descriptor = os.open(
            Path(folder) / hashlib.sha256(line.encode("utf-8", "surrogatepass")).hexdigest(),
            os.O_CREAT | os.O_EXCL | os.O_WRONLY,
        )
    except FileExistsError:
        return False
    except OSError:  # a full or vanished temporary folder: rather twice than not at all
        return True
    os.close(descriptor)
    return True


def run_rank(main: Callable[[], int | None]) -> None:
    """`pipeline.errors.run_command` for a process that may be one of several ranks.

    A UserError is printed by the first rank that has it. One that only a single rank has is always printed.

    One whose work has ended well leaves without the interpreter's own end, which would take a second; and there the
    threads of torch's process groups are now and then destroyed while they run ("terminate called without an active
    exception"), so that a training whose results are all written would count as failed.
    """

    def once() -> int | None:
        try:
            return main()
        except UserError as error:
            if first_to_say(str(error)):
                raise
            return USER_ERROR

    run_and_leave(once, well=(0, EX_TEMPFAIL))
