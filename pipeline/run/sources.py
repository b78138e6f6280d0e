"""Which folder each model comes from: a stage's artifact, or a folder or hub snapshot that the config names.

`prefetch` records what it took from the hub as pins: the commit, the snapshot's folder, and its files. All later
stages use exactly these, and say so before they start when they are not there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run.directory import RunDir

EMBEDDED = "embedded"

SETTINGS = {
    "model": "model.path",
    "tokenizer": "model.tokenizer_path",
    "reward_model": "reward_model.checkpoint",
    "checkpoint_base": "reward_model.checkpoint_base",
    "data": "data.source",
}
"""The setting that names each source."""


@dataclass(frozen=True)
class Pin:
    """What prefetch took from the hub, as its values hold it."""

    name: str
    """The hub id."""
    revision: str | None
    """As the configuration names it; None for the main branch."""
    commit: str
    folder: str
    """The snapshot in the hub's cache."""
    files: dict[str, int]
    """Size in bytes by path below the folder."""

    def fault(self) -> str | None:
        """What is wrong with the snapshot on this machine, with its remedy; None when it is whole."""
        folder = Path(self.folder)
        if not folder.is_dir():
            return (
                f"the snapshot that prefetch took, {folder}, is not on {os.uname().nodename}; set cluster.cache "
                "(or HF_HOME) to a folder that all nodes see, and run --stage prefetch again"
            )
        for name, size in self.files.items():
            path = folder / name
            if not path.is_file():  # also a link whose blob was purged
                return f"its snapshot is incomplete: {path} is missing; run --stage prefetch again"
            if path.stat().st_size != size:
                found = path.stat().st_size
                return f"its snapshot is damaged: {path} has {found} bytes, not {size}; remove it, and prefetch again"
        return None


def models_of(config: Config) -> dict[str, tuple[str, str | None]]:
    """The models that the configuration names, as (folder or hub id, revision)."""
    named = {"model": (config.model.path, config.model.revision)}
    if config.model.path == EMBEDDED:
        del named["model"]
    if config.model.tokenizer_path is not None:
        named["tokenizer"] = (config.model.tokenizer_path, None)
    if config.reward_model.checkpoint is not None:
        named["reward_model"] = (config.reward_model.checkpoint, config.reward_model.revision)
        if config.reward_model.checkpoint_base is not None:
            named["checkpoint_base"] = (
                config.reward_model.checkpoint_base,
                config.reward_model.checkpoint_base_revision,
            )
    return named


def pins(run: RunDir) -> dict[str, Pin]:
    """What prefetch took from the hub, by source; empty before it is done."""
    recorded: dict[str, dict[str, Any]] = run.values("prefetch").get("hub", {})
    return {key: Pin(**value) for key, value in recorded.items()}


def pinned(run: RunDir, key: str, name: str, revision: str | None) -> Pin | None:
    """The pin of a source, if it is of this hub id and revision."""
    pin = pins(run).get(key)
    return pin if pin is not None and (pin.name, pin.revision) == (name, revision) else None


def read_by(stage: str, config: Config) -> tuple[str, ...]:
    """The sources that a stage's work reads from outside the run."""
    base = ("model",) if "sft" not in config.all else ()
    reads = {
        "sft": ("model", "tokenizer"),
        "reward-model": ("model", "tokenizer") if config.reward_model.base == "model" else (),
        "convert": ("reward_model", "checkpoint_base"),
        "train": (*base, "tokenizer", "reward_model"),
        "evaluate": (*(base if "train" in config.all else ("model",)), "reward_model"),
    }
    return tuple(key for key in reads.get(stage, ()) if key in models_of(config))


def check_sources(run: RunDir, config: Config, stage: str) -> None:
    """UserError, in one line, when a source of the stage is not whole on this machine."""
    for key in read_by(stage, config):
        _source(run, config, key)


def base_model_path(run: RunDir, config: Config) -> Path:
    """The causal language model that everything starts from, with its tokenizer."""
    if config.model.path == EMBEDDED:
        return run.artifact("prefetch", "model")
    return _source(run, config, "model")


def policy_start_path(run: RunDir, config: Config) -> Path:
    """What PPO starts from: the SFT model where the run has that stage, else the base model."""
    return supervised_model(run, "sft") if "sft" in config.all else base_model_path(run, config)


def supervised_model(run: RunDir, stage: str) -> Path:
    """The model of `sft` or `reward-model` that goes on to what follows: the best where it was kept, else the last.

    What the stage made decides, and not the configuration, which may have changed since: what a later stage takes is
    then a function of the inputs in its fingerprint.
    """
    return run.artifact(stage, "best" if keeps_best(run, stage) else "model")


def keeps_best(run: RunDir, stage: str) -> bool:
    """Whether a finished stage has the artifact "best" beside what its training ended in."""
    outputs = run.outputs(stage)
    return outputs is not None and "best" in outputs.artifacts


def compared_paths(run: RunDir, config: Config) -> tuple[Path, Path]:
    """(start, trained) of the evaluation: of a run without the stage `train`, the base model and its SFT."""
    if "train" in config.all:
        return policy_start_path(run, config), run.artifact("train", "policy")
    return base_model_path(run, config), supervised_model(run, "sft")


def reward_model_path(run: RunDir, config: Config) -> Path:
    """The reward model: what this run trained, or a checkpoint in any layout that conversion reads."""
    if config.reward_model.checkpoint is None:
        return supervised_model(run, "reward-model")
    return _source(run, config, "reward_model")


def checkpoint_base_path(run: RunDir, config: Config) -> Path | None:
    """The model whose configuration and tokenizer a checkpoint without its own takes; None where none is named."""
    return _source(run, config, "checkpoint_base") if "checkpoint_base" in models_of(config) else None


def tokenizer_path(run: RunDir, config: Config, model: Path) -> Path:
    """The tokenizer that belongs to the model folder `model`: the one that the config names, else the model's own."""
    if config.model.tokenizer_path is None:
        return model
    return _source(run, config, "tokenizer")


def _source(run: RunDir, config: Config, key: str) -> Path:
    """A folder as it is, or the snapshot that `prefetch` recorded for a hub id."""
    name, revision = models_of(config)[key]
    folder, place = Path(name), f"{SETTINGS[key]}: {name}"
    if folder.is_dir():
        return folder.resolve()
    if folder.is_absolute():
        raise UserError(f"{place}: no such folder on {os.uname().nodename}; put it where all nodes see it")
    pin = pinned(run, key, name, revision)
    if pin is None:
        at = f" at revision {revision}" if revision else ""
        raise UserError(f"{place}: neither a folder nor prefetched{at}; run --stage prefetch where the hub is reached")
    fault = pin.fault()
    if fault is not None:
        raise UserError(f"{place}: {fault}")
    return Path(pin.folder)
