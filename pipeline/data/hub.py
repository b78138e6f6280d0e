"""Faults of the Hugging Face hub, told from faults of this program, whichever HTTP library its client uses."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from pipeline.errors import UserError

_LIBRARIES = frozenset(
    {"huggingface_hub", "datasets", "fsspec", "aiohttp", "httpx", "httpcore", "httpx2", "httpcore2"}
    | {"requests", "urllib3"}
)
"""What the hub's clients are made of. Their HTTP library changed twice, so its errors are known by where they are
defined and not by import."""

_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})


@contextlib.contextmanager
def hub_errors(problem: str, remedy: str) -> Iterator[None]:
    """Turn what the hub's clients raise into one line: problem, reason, remedy. Other exceptions pass."""
    try:
        yield
    except Exception as error:
        if not is_hub_fault(error):
            raise
        if isinstance(error, OSError) and error.errno in _DISK:
            remedy = "free some space, or set HF_HOME to a folder that can be written to"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{problem} ({reason}); {remedy}") from error


def is_hub_fault(error: Exception) -> bool:
    """Whether the hub, the network, the disk or a wrong name explains `error`.

    The clients raise OSError (also for a repository or revision that is not there, and for offline mode), ValueError
    (a name that cannot be one), errors of their own, and errors of their HTTP library as they are.
    """
    if isinstance(error, (OSError, ValueError)):
        return True
    return any(base.__module__.partition(".")[0] in _LIBRARIES for base in type(error).__mro__)
