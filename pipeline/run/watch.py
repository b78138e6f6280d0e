"""Whether something that another node keeps changing still changes, by this process's own clock: clocks differ."""

from __future__ import annotations

import time


class Watch:
    """Looks at one thing again and again."""

    def __init__(self) -> None:
        self._seen: object = object()  # equal to nothing that can be seen
        self._since = 0.0

    def still_s(self, seen: object) -> float:
        """Seconds for which it has looked as it does now; 0.0 when it has just changed."""
        now = time.monotonic()
        if seen != self._seen:
            self._seen, self._since = seen, now
        return now - self._since
