"""Asking the system: short commands and calls that may hang, none of which can hold up the others for long."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pipeline import procs
from pipeline.errors import UserError

COMMAND_S = 5.0
"""Seconds that one command may take."""
DEADLINE_S = 12.0
"""Seconds after which whoever has not answered is given up, as on a file system that hangs in the kernel."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Answer:
    """What a command said. `status` is None when it is not there or did not answer; then `text` says which."""

    status: int | None
    text: str

    @property
    def ok(self) -> bool:
        return self.status == 0

    @property
    def line(self) -> str:
        """All of it on one line."""
        return " ".join(self.text.split())


def ask(argv: Sequence[str], timeout_s: float = COMMAND_S, env: Mapping[str, str] | None = None) -> Answer:
    """Run a command; whatever happens is an answer."""
    try:
        return Answer(*procs.capture(argv, timeout_s=timeout_s, env=env))
    except UserError as error:
        return Answer(None, str(error))
    except OSError as error:  # there, but not to be run
        return Answer(None, f"{argv[0]}: {os.strerror(error.errno or 0)}")


def together(questions: Mapping[str, Callable[[], Value]], deadline_s: float = DEADLINE_S) -> dict[str, Value | None]:
    """Ask all at once; who has not answered by the deadline has None. An exception of one is raised here.

    The threads are daemons: one that hangs in the kernel does not keep the program from ending.
    """
    answers: dict[str, Value] = {}
    errors: list[BaseException] = []

    def answer(name: str, question: Callable[[], Value]) -> None:
        try:
            answers[name] = question()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=answer, args=each, name=f"ask-{each[0]}", daemon=True) for each in questions.items()
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + deadline_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if errors:
        raise errors[0]
    return {name: answers.get(name) for name in questions}
