"""Work that is done in the background, in the order in which it was given, until it is all done or one fails."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Writer:
    """Does pieces of work one after another in a thread of its own. After an error the rest is dropped."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether a piece of work has ended with an error that `wait` has not told yet."""
        return self._error is not None

    def start(self, work: Callable[[], None]) -> None:
        """Have `work` done when all that was given before is done."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
            self._thread.start()
        self._work.put(work)

    def wait(self) -> BaseException | None:
        """Wait until everything is done; the error that ended it, if any."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def finish(self, timeout_s: float) -> None:
        """Let what was given be done, at most so long. For a process that is about to end; `wait` tells errors."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                if self._error is None:
                    work()
            except BaseException as error:
                self._error = error
            del work  # and with it the copies that it wrote, which may be as large as the training's own state
