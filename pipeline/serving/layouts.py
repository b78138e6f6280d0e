"""From a checkpoint's names of weights to those of Hugging Face's sequence classification class.

Read are that class's own names, and those of trlX's reward models: the base model as `transformer.*` with a
bias-free `v_head` (also under `module.`, as DeepSpeed saves it, and with the copies under `model.*` that its later
version wrote).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.errors import UserError
from pipeline.serving.checkpoints import HEAD, Weights
from pipeline.serving.tensors import Lazy
from pipeline.training.models import BUFFERS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SCORE = "score.weight"
_WRAPPERS = ("module.", "model.")
_BASES = ("transformer.", "gpt_neox.", "model.")
_COPIED_HEAD = re.compile(r"(module\.)?model\.(lm_head\.(weight|bias)|embed_out\.weight)")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SHOWN = 5


@dataclass(frozen=True)
class Architecture:
    """What a sequence classification class wants of its weights."""

    name: str
    """The class."""
    shapes: dict[str, tuple[int, ...]]
    bases: tuple[str, ...]
    """What its base model's names begin with, and those of the decoder inside, where it has one."""
    embedding: str
    """The table of token embeddings, whose first dimension is the vocabulary."""


def architecture(config: PretrainedConfig, where: Path) -> Architecture:
    """The class for a model's configuration, built without memory; UserError (about `where`) where there is none."""
    from transformers import AutoModelForSequenceClassification

    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except (ValueError, AssertionError) as error:  # no such class; or sizes that do not go together
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{where}: makes no sequence classification model ({reason}); use a GPT-like model with its own config"
        ) from error
    if not isinstance(getattr(model, "score", None), torch.nn.Module):
        raise UserError(f"{where}: {type(model).__name__} has no score head; use a GPT-like model")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    table = model.get_input_embeddings().weight
    embedding = next(name for name, parameter in model.named_parameters() if parameter is table)
    prefix = f"{model.base_model_prefix}."
    bases = (prefix, f"{prefix}decoder.") if hasattr(model.base_model, "decoder") else (prefix,)
    return Architecture(type(model).__name__, shapes, bases, embedding)


def arrange(weights: Weights, wanted: Architecture, where: Path) -> dict[str, Lazy]:
    """The weights under the class's names, in its order.

    UserError with the names when some are missing, left over, of another shape than the configuration `where` asks
    for, or not floating-point numbers.
    """
    taken: dict[str, Lazy] = {}
    unexpected = []
    for key, tensor in weights.tensors.items():
        name = _target(key, wanted)
        if name is None:
            if not _ignored(key) and not _is_zero_bias(key, tensor, weights.name):
                unexpected.append(key)
        elif name in taken:
            taken[name] = _same(taken[name], tensor, weights.name)
        else:
            taken[name] = tensor
    missing = [name for name in wanted.shapes if name not in taken]
    if SCORE in taken and taken[SCORE].shape[:1] != (1,):
        head = taken[SCORE]
        raise UserError(
            f"{weights.name}: {head.key} has shape {list(head.shape)}; a reward model's head has one row, one label"
        )
    shapes = [
        f"{tensor.key} is {list(tensor.shape)} in the checkpoint, {list(wanted.shapes[name])} by {where}"
        for name, tensor in taken.items()
        if tensor.shape != wanted.shapes[name]
    ]
    stored = [f"{tensor.key} is {tensor.dtype}" for tensor in taken.values() if tensor.dtype not in _DTYPES]
    faults = [
        *_listed("missing", missing),
        *_listed("unexpected", unexpected),
        *_listed("wrong shape", shapes, "; "),
        *_listed("quantised", stored),
    ]
    if faults:
        raise UserError(
            f"{weights.files[0].parent / weights.name}: the weights do not fit {wanted.name} "
            f"({'; '.join(faults)}); is this its base model, and the checkpoint whole?"
        )
    return {name: taken[name] for name in wanted.shapes}


def vocabulary(weights: Weights, wanted: Architecture) -> int | None:
    """The tokens that the checkpoint's embeddings hold, of which a resized model has others than its base."""
    for key, tensor in weights.tensors.items():
        if _target(key, wanted) == wanted.embedding and len(tensor.shape) == 2:
            return tensor.shape[0]
    return None


def _target(key: str, wanted: Architecture) -> str | None:
    """The class's name for a checkpoint's weight, or None."""
    for plain in _unwrapped(key):
        if plain in wanted.shapes:
            return plain
        if HEAD.fullmatch(plain) and plain.endswith(".weight"):
            return SCORE
        for old in _BASES:
            for base in wanted.bases:
                if plain.startswith(old) and (name := base + plain.removeprefix(old)) in wanted.shapes:
                    return name
    return None


def _unwrapped(key: str) -> Iterator[str]:
    """The key, and what is left of it without the names of the modules around the model."""
    yield key
    for wrapper in _WRAPPERS:
        if key.startswith(wrapper):
            yield from _unwrapped(key.removeprefix(wrapper))


def _ignored(key: str) -> bool:
    """Whether a weight is a constant of older versions, or the LM head in trlX's copy of the base model."""
    return bool(BUFFERS.search(key) or _COPIED_HEAD.fullmatch(key))


def _is_zero_bias(key: str, tensor: Lazy, file: str) -> bool:
    """Whether it is the head's bias, and 0; UserError for another, for which the class has no place."""
    if not HEAD.search(key) or not key.endswith(".bias"):
        return False
    values = tensor.read().float().flatten().tolist()
    if any(value != 0 for value in values):
        raise UserError(
            f"{file}: {key} is {values[0]:.4g}, but Hugging Face's classes have no bias there; remove it from the "
            "checkpoint: all rewards then shift by that much, which changes no comparison"
        )
    return True


def _same(one: Lazy, other: Lazy, file: str) -> Lazy:
    """`one`, if `other` is a copy of it; UserError when they differ."""
    if one.shape != other.shape or not torch.equal(one.read(), other.read()):
        raise UserError(f"{file}: {one.key} and {other.key} are the same weight, with different values; keep one")
    return one


def _listed(word: str, names: list[str], separator: str = ", ") -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{word}: {separator.join(names[:_SHOWN])}{more}"]
