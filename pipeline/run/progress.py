"""How far the run's trainings have got: what decides whether a job that ran out of time is worth another start."""

from __future__ import annotations

import re

from pipeline.run.directory import RunDir

_COMPLETE = re.compile(r"step-(\d+)")
"""The name of a checkpoint's folder, which it gets when it is whole."""


SUPERVISED = ("sft", "reward-model")
"""Stages whose checkpoints' folders begin with their name; those of `train` have a name without."""


def folder_name(stage: str, fingerprint: str) -> str:
    """The name of the folder of a training's checkpoints, which a fingerprint tells from the others'."""
    return f"{stage}-{fingerprint}" if stage in SUPERVISED else fingerprint


def stage_of(folder: str) -> str:
    """The stage whose training has its checkpoints in a folder of this name."""
    return next((stage for stage in SUPERVISED if folder.startswith(f"{stage}-")), "train")


def saved_steps(run: RunDir, stage: str | None = None) -> int:
    """The steps that are safe: of each training in the run directory (or of one stage's) the highest complete
    checkpoint, added up.

    The sum grows whenever one of them gets further, also one that begins anew beside an older one (with other
    settings, or by force). Compare it with what it was when the attempt began.
    """
    highest: dict[str, int] = {}
    for path in run.checkpoints.glob("*/step-*"):
        found = _COMPLETE.fullmatch(path.name)
        training = path.parent.name
        if found and stage in (None, stage_of(training)):
            highest[training] = max(highest.get(training, 0), int(found[1]))
    return sum(highest.values())
