"""Which folder each model comes from: a stage's artifact, or a folder or hub snapshot that the config names."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run.directory import RunDir

EMBEDDED = "embedded"


def base_model_path(run: RunDir, config: Config) -> Path:
    """The causal language model that everything starts from, with its tokenizer."""
    if config.model.path == EMBEDDED:
        return run.artifact("prefetch", "model")
    return _snapshot(run, "model", config.model.path)


def policy_start_path(run: RunDir, config: Config) -> Path:
    """What PPO starts from: the SFT model where the run has that stage, else the base model."""
    return run.artifact("sft", "model") if "sft" in config.all else base_model_path(run, config)


def reward_model_path(run: RunDir, config: Config) -> Path:
    """The reward model (one-label sequence classification, with its tokenizer)."""
    if config.reward_model.checkpoint is None:
        return run.artifact("reward-model", "model")
    return _snapshot(run, "reward_model", config.reward_model.checkpoint)


def tokenizer_path(run: RunDir, config: Config, model: Path) -> Path:
    """The tokenizer that belongs to the model folder `model`: the one that the config names, else the model's own."""
    if config.model.tokenizer_path is None:
        return model
    return _snapshot(run, "tokenizer", config.model.tokenizer_path)


def _snapshot(run: RunDir, key: str, name: str) -> Path:
    """A folder as it is, or the snapshot that `prefetch` recorded for a hub id."""
    folder = Path(name)
    if folder.is_dir():
        return folder.resolve()
    recorded = run.values("prefetch").get("snapshots", {}).get(key)
    if recorded is None or not Path(recorded).is_dir():
        raise UserError(f"{name}: neither a folder nor prefetched; run --stage prefetch where the hub can be reached")
    return Path(recorded)
