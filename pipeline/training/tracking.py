"""Experiment trackers through accelerate: Weights & Biases online where it finds a key, offline where it does not.

A training is one run there, however many segments it has: each segment gives the same id. Offline, each leaves a
folder of its own, and `python -m pipeline.sync` sends them all to that one run.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import Config
from pipeline.config.training import SHOWN_APART
from pipeline.errors import UserError
from pipeline.training.dumps import COLUMNS, markdown_table

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pipeline.training.heldout import Answer

logger = logging.getLogger(__name__)

Scalar = bool | int | float | str

_REMEDY = "set WANDB_MODE=offline, or train.tracker=none"


def tracker_of(config: Config) -> str | None:
    """The tracker's name as accelerate knows it, or None; UserError when its package is not installed."""
    name = config.train.tracker
    if name == "none":
        return None
    if importlib.util.find_spec(name) is None:
        raise UserError(f"train.tracker: the package {name} is not installed; install it or set train.tracker=none")
    return name


def run_id(run: Path, training: str) -> str:
    """The same for all segments of a training of a run directory, and no other's."""
    return hashlib.sha256(f"{run}\0{training}".encode()).hexdigest()[:16]


def start_tracker(
    accelerator: Accelerator, config: Config, sections: Sequence[str], folder: Path, name: str, identity: str
) -> None:
    """Start the configured tracker, if any, for a run called `name`; its files lie below `folder`.

    It is told the settings in `sections`, which are those that the training follows.
    """
    tracker = tracker_of(config)
    if tracker is None or not accelerator.is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    settings = shown_settings(config, sections)
    if tracker == "wandb":
        _start_wandb(accelerator, config.train.project_name, settings, folder, name, identity)
    else:  # TensorBoard knows no identity but its folder
        accelerator.init_trackers(f"{config.train.project_name}/{name}-{identity}", settings)


def shown_settings(config: Config, sections: Sequence[str]) -> dict[str, Scalar]:
    """The settings of these sections by their dotted names, as --set takes them, with preset and seed.

    Lists are JSON texts, since TensorBoard takes plain values alone; what is not set is left out.
    """
    shown: dict[str, Scalar] = {"preset": config.preset, "seed": config.seed}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                add(f"{name}.{key}", item)
        elif value is not None:
            shown[name] = value if isinstance(value, (bool, int, float, str)) else json.dumps(value)

    for section in sections:
        add(section, getattr(config, section).model_dump(mode="json", exclude=SHOWN_APART))
    return shown


def _start_wandb(
    accelerator: Accelerator, project: str, settings: dict[str, Scalar], folder: Path, name: str, identity: str
) -> None:
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    options = {"dir": str(folder), "name": name, "id": identity, "resume": "allow"}
    try:
        if "WANDB_MODE" not in os.environ and not wandb_finds_a_key():
            logger.info("Weights & Biases finds no key: it writes offline, below %s", folder)
            options["mode"] = "offline"  # the variable is too late: looking for a key has read the environment
        accelerator.init_trackers(project, settings, {"wandb": options})
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"train.tracker: Weights & Biases does not start ({reason}); {_REMEDY}") from error


def go_on_from(accelerator: Accelerator, step: int) -> None:
    """What was logged from `step` on will be logged again. Weights & Biases takes no step twice, and keeps the first;
    TensorBoard is told to forget."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            events = importlib.import_module("tensorboard.compat.proto.event_pb2")
            restart = events.Event(step=step, session_log=events.SessionLog(status=events.SessionLog.START))
            tracker.writer.file_writer.add_event(restart)


def log_samples(accelerator: Accelerator, answers: Sequence[Answer], step: int) -> None:
    """Show evaluation samples: as a table in Weights & Biases, as text in TensorBoard."""
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            rows = [[answer.plain()[name] for name in COLUMNS] for answer in answers]
            tracker.log_table("samples", columns=list(COLUMNS), data=rows, step=step)
        elif tracker.name == "tensorboard":
            tracker.writer.add_text("samples", markdown_table(answers), global_step=step)


def end_tracking(accelerator: Accelerator) -> None:
    """Finish the trackers; what Accelerator.end_training does, but for the end of the processes' group.

    Once the group is destroyed, the model's wrapper holds the last of it, and frees it with Python's lock in hand while
    the group's thread waits for that lock: now and then a finished rank hung for ever. Ranks leave by os._exit
    (report_once.py), before anything is freed.
    """
    for tracker in accelerator.trackers:
        tracker.finish()


def wandb_finds_a_key() -> bool:
    """Whether wandb finds credentials: in the environment, in a netrc file (`wandb login`), or in its settings.

    It is asked itself, because files, their order and the server's name are its business and differ by version.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)  # versions whose login would ask at the terminal
