"""`accelerate launch` with an honest exit status: `python -m pipeline.training.launch <accelerate's arguments>`.

accelerate's launcher answers any failure of a process with a traceback of its own and status 1. A training that
saved and stopped (75), or one that printed its one line of error (2), ends here with that very status.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline import heavy
from pipeline.procs import PARENT_MARK

if __name__ == "__main__":
    heavy.begin()  # before the imports below, which take seconds
    os.environ[PARENT_MARK] = str(os.getpid())  # the processes that it starts are bound to the launcher

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from pipeline.training.report_once import USER_ERROR, shared_folder
from pipeline.training.stop import EX_TEMPFAIL, STOPPED


def main(argv: list[str] | None = None) -> int:
    """Launch, and return the exit status of the process that ended first.

    One that ended with a line of error is the cause, even where another, which lost it, was noticed before.
    """
    arguments = launch_command_parser().parse_args(argv)
    try:
        with shared_folder():
            launch_command(arguments)
    except ChildFailedError as error:
        if USER_ERROR in {failure.exitcode for failure in error.failures.values()}:
            return USER_ERROR
        _, failure = error.get_first_failure()
        return int(failure.exitcode) if failure.exitcode > 0 else 128 - int(failure.exitcode)
    except SignalException as error:
        # The processes were told, and waited for: did the training save and stop?
        return EX_TEMPFAIL if _stopped(arguments.training_script_args) else 128 + int(error.sigval)
    return 0


def _stopped(arguments: list[str]) -> bool:
    """Whether the launched work left its note that it saved and stopped."""
    if "--out" not in arguments[:-1]:
        return False
    return (Path(arguments[arguments.index("--out") + 1]) / STOPPED).exists()


if __name__ == "__main__":
    heavy.run_and_leave(main, well=(0, EX_TEMPFAIL))
