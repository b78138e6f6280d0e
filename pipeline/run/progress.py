"""How far the run's trainings have got: what decides whether a job that ran out of time is worth another start."""

from __future__ import annotations

import re

from pipeline.run.directory import RunDir

_COMPLETE = re.compile(r"step-(\d+)")
"""The name of a checkpoint's folder, which it gets when it is whole."""


def saved_steps(run: RunDir) -> int:
    """The steps that are safe: of each training in the run directory the highest complete checkpoint, added up.

    The sum grows whenever one of them gets further, also one that begins anew beside an older one (with other
    settings, or by force). Compare it with what it was when the attempt began.
    """
    highest: dict[str, int] = {}
    for path in run.checkpoints.glob("*/step-*"):
        found = _COMPLETE.fullmatch(path.name)
        if found:
            training = path.parent.name
            highest[training] = max(highest.get(training, 0), int(found[1]))
    return sum(highest.values())
