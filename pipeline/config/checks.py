"""Checks across configuration sections. Each raises ValueError with one line: key, fault, remedy."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.check_losses import check_losses
from pipeline.config.check_methods import check_ilql, check_ppo
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.methods import Supervised
    from pipeline.config.schema import Config

SAMPLING = frozenset({"train", "evaluate"})
"""Stages that sample answers."""
SCORING = frozenset({"reward-model", "convert", "serve", *SAMPLING})
"""Stages that make or ask the model that scores them."""


@dataclass(frozen=True)
class ModelSize:
    """What limits the lengths and layers that a model can be used with; None where it is not known."""

    layers: int | None
    positions: int | None
    layers_from: str
    """Where the number of layers is written: a key of the configuration or a file."""
    positions_from: str


def check_sizes(config: Config) -> None:
    """Refuse sizes that cannot work together, before any job is submitted."""
    _check_embedded(config)
    _check_placement(config)
    if config.serving.flavour == "torchscript" and config.sandbox.engine in ("venv", "none"):
        raise ValueError(
            f"serving.flavour: torchscript is served by a container image, not by sandbox.engine = "
            f'"{config.sandbox.engine}", which has no PyTorch backend; take a container engine, or flavour python'
        )
    if config.serving.attention == "flash_attention_2" and config.serving.dtype == "float32":
        raise ValueError("serving.attention: flash_attention_2 computes in 16 bits only; use auto, or another dtype")
    for sequence in config.generate.stop_sequences:
        if not sequence:
            raise ValueError("generate.stop_sequences: an empty stop sequence would end every response; remove it")
    _check_stages(config, frozenset(config.all))


def check_selected(config: Config, selected: Collection[str]) -> None:
    """The same of the stages that are asked for outside `all`; and adapters need one that trains them. UserError."""
    stages = frozenset(config.all) | frozenset(selected)
    try:
        _check_stages(config, stages)
    except ValueError as fault:
        raise UserError(str(fault)) from None
    if config.model.lora.rank and "train" not in stages:
        raise UserError(
            "model.lora.rank: adapters are PPO's, and the stage train is not among those to run; leave it out"
        )


def _check_stages(config: Config, stages: Collection[str]) -> None:
    """What only some stages read is checked only where these are part of the run."""
    trained: list[tuple[str, Supervised]] = [("sft", config.sft)] if "sft" in stages else []
    if "reward-model" in stages and config.reward_model.checkpoint is None:
        trained.append(("reward_model", config.reward_model))
    _check_precision(trained)
    _check_best(trained)
    _check_model(config, stages)
    generate, train = config.generate, config.train
    if not SAMPLING.isdisjoint(stages) and train.seq_length <= generate.max_new_tokens:
        raise ValueError(
            f"train.seq_length: {train.seq_length} leaves no room for a prompt beside generate.max_new_tokens = "
            f"{generate.max_new_tokens}; raise the first or lower the second"
        )
    if "train" not in stages:
        return
    if train.method == "ppo":
        check_ppo(config.ppo, train.batch_size)
        check_losses(config.ppo, train.total_steps)
    else:
        check_ilql(config.ilql)
        if config.model.lora.rank:
            raise ValueError(
                "model.lora.rank: adapters are PPO's; leave it out with train.method = ilql, which trains the weights"
            )


def _check_precision(trained: Sequence[tuple[str, Supervised]]) -> None:
    """DeepSpeed's configs are named by the precision that they are for."""
    for section, settings in trained:
        name, precision = settings.accelerate_config, settings.mixed_precision
        said = name.rpartition("-")[2]
        if said in ("bf16", "fp16") and said != precision:
            raise ValueError(
                f"{section}.accelerate_config: {name} computes in {said}, not in {section}.mixed_precision = "
                f'"{precision}"; change one of them'
            )


def _check_best(trained: Sequence[tuple[str, Supervised]]) -> None:
    """The best of one evaluation is the last."""
    for section, settings in trained:
        if settings.save_best and settings.eval_interval is None:
            raise ValueError(
                f"{section}.save_best: needs evaluations to choose from; set {section}.eval_interval, or leave it out"
            )


def _check_placement(config: Config) -> None:
    """Where and for how long jobs run must make sense together; a server of its own must be in reach."""
    if config.cluster.on_login_node and config.cluster.executor != "slurm":
        raise ValueError(
            f'cluster.on_login_node: cluster.executor = "{config.cluster.executor}" runs every stage where submit '
            "runs; leave it out"
        )
    cluster, train = config.cluster, config.cluster.resources("train")
    if cluster.executor == "slurm" and cluster.requeue and train.time_min * 60 <= cluster.grace_s:
        raise ValueError(
            f"cluster.grace_s: {cluster.grace_s} s is all of the training's time_min = {train.time_min}: it would be "
            "told to save as soon as it starts; raise time_min, or lower grace_s"
        )
    if cluster.executor == "allocation" and cluster.retries:
        raise ValueError(
            'cluster.retries: jobs inside one allocation cannot ask for more; leave it out with executor = "allocation"'
        )
    if config.cluster.placement != "separate":
        return
    if config.cluster.executor != "slurm":
        raise ValueError(
            'cluster.placement: "separate" needs cluster.executor = "slurm"; on one machine take "colocated"'
        )
    if config.serving.bind in ("unix", "loopback"):
        raise ValueError(
            f'serving.bind: "{config.serving.bind}" cannot be reached from other nodes, where '
            'cluster.placement = "separate" puts the training; take "auto"'
        )


def _check_embedded(config: Config) -> None:
    embedded = config.model.embedded
    if config.model.path == "embedded" and embedded.hidden_size % embedded.num_heads:
        raise ValueError(
            f"model.embedded.hidden_size: {embedded.hidden_size} is not a multiple of "
            f"model.embedded.num_heads = {embedded.num_heads}; change one of them"
        )


def _check_model(config: Config, stages: Collection[str]) -> None:
    """Refuse lengths and layers that the model does not have, as far as they are known before anything is fetched."""
    size = _policy_size(config)
    if not SAMPLING.isdisjoint(stages):
        _check_layers(config.model.num_layers_unfrozen, size)
    lengths = {"train.seq_length": config.train.seq_length} if not SAMPLING.isdisjoint(stages) else {}
    if "sft" in stages:
        lengths["sft.max_length"] = config.sft.max_length
    rewards = {"serving.max_length": config.serving.max_length} if not SCORING.isdisjoint(stages) else {}
    if config.reward_model.checkpoint is None:  # the reward model is trained from the policy's base
        if "reward-model" in stages:
            lengths["reward_model.max_length"] = config.reward_model.max_length
        lengths |= rewards
    elif rewards:
        _check_lengths(rewards, _folder_size("reward_model.checkpoint", config.reward_model.checkpoint))
    _check_lengths(lengths, size)


def _check_layers(unfrozen: int, size: ModelSize) -> None:
    """A number of top layers, at most as many as the model has, or -1 for the whole model."""
    if unfrozen == 0:
        raise ValueError(
            "model.num_layers_unfrozen: 0 leaves nothing to train; give the number of top layers, or -1 for all of "
            "the model"
        )
    if size.layers is not None and unfrozen > size.layers:
        raise ValueError(
            f"model.num_layers_unfrozen: {unfrozen} is more than the model's {size.layers} layers "
            f"({size.layers_from}); give at most {size.layers}, or -1 for all of the model"
        )


def _check_lengths(lengths: dict[str, int], size: ModelSize) -> None:
    for key, length in lengths.items():
        if size.positions is not None and length > size.positions:
            raise ValueError(
                f"{key}: {length} is more than the model's {size.positions} positions ({size.positions_from}); "
                f"give at most {size.positions}"
            )


def _policy_size(config: Config) -> ModelSize:
    if config.model.path != "embedded":
        return _folder_size("model.path", config.model.path)
    embedded = config.model.embedded
    keys = ("model.embedded.num_layers", "model.embedded.max_positions")
    return ModelSize(embedded.num_layers, embedded.max_positions, *keys)


def _folder_size(key: str, name: str) -> ModelSize:
    """What the config.json of a model folder says; nothing is known of a hub id."""
    path = Path(name) / "config.json"
    raw: Any = {}
    if path.is_file():
        try:
            raw = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{key}: {path}: cannot be read ({error}); restore it, or give another folder") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{key}: {path}: is not a JSON object; restore it, or give another folder")
    layers = _first_int(raw, "num_hidden_layers", "n_layer")
    positions = _first_int(raw, "max_position_embeddings", "n_positions")
    return ModelSize(layers, positions, str(path), str(path))


def _first_int(raw: dict[str, Any], *keys: str) -> int | None:
    """The first of the keys that holds a number; architectures name the same thing differently."""
    return next((raw[key] for key in keys if type(raw.get(key)) is int), None)
