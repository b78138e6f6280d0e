"""Docker's containers live in its daemon, and outlive the command that started them: here they are found and removed.

A container's name bears its owner's mark; the label says that it is one of ours.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from pipeline import procs
from pipeline.errors import UserError
from pipeline.run.owner import is_orphaned

LABEL = "hh-pipeline.user"
_NAME = "--name="

logger = logging.getLogger(__name__)


def identity(name: str) -> list[str]:
    """Options of `docker run` for a container that is removed by its name."""
    return [f"{_NAME}{name}", f"--label={LABEL}={os.getuid()}"]


def name_in(argv: Sequence[str]) -> str | None:
    """The container's name in a command line of `docker run`; None in any other."""
    if list(argv[:2]) != ["docker", "run"]:
        return None
    return next((word.removeprefix(_NAME) for word in argv if word.startswith(_NAME)), None)


def remove(name: str) -> None:
    """Remove a container, running or not; nothing happens where it is gone. A daemon that refuses is logged."""
    _docker("rm", "--force", name)


def sweep() -> list[str]:
    """Remove the containers of this user whose owners on this node were killed; returns their names."""
    listed = _docker("ps", "--all", f"--filter=label={LABEL}={os.getuid()}", "--format={{.Names}}")
    doomed = [name for name in listed.split() if is_orphaned(name)]
    for name in doomed:
        remove(name)
    return doomed


def _docker(*arguments: str) -> str:
    """What docker says; nothing where it fails, which is logged: it would fail at what matters, too."""
    try:
        status, text = procs.capture(["docker", *arguments])
    except UserError as error:
        status, text = 1, str(error)
    if status == 0:
        return text
    if "no such container" not in text.lower():
        logger.warning("docker %s: %s", " ".join(arguments), " ".join(text.split()))
    return ""
