"""Loading models from local folders, and refusing those whose weights do not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pipeline.errors import UserError
from pipeline.run import atomic

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUFFERS = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$|\.embed_positions$|position_ids$")
"""Constants that older checkpoints of GPT-J, GPT-2 and GPT-NeoX store beside their weights."""
_NEW_HEAD = {"score.weight"}
_LM_HEADS = {"lm_head.weight", "lm_head.bias", "embed_out.weight"}


def load_causal_lm(path: Path, dtype: torch.dtype, *, weights: bool = True) -> PreTrainedModel:
    """Load a causal language model from a folder, offline.

    Without `weights` what is in the model has the weights' shapes, takes no memory, and is to be replaced
    (`sharding.py: spread`). UserError when the folder holds no model, or weights are missing, left over or of another
    shape.
    """
    from transformers import AutoModelForCausalLM

    if not weights:
        return _without_weights(AutoModelForCausalLM, path, dtype)
    model, info = _load(AutoModelForCausalLM, path, dtype)
    missing = set(info["missing_keys"])
    if getattr(model.config, "tie_word_embeddings", False):
        missing -= _LM_HEADS
    _check_keys(path, info, missing, set(info["unexpected_keys"]))
    return model


def load_reward_model(
    path: Path, dtype: torch.dtype, *, new_head: bool = False, attention: str | None = None, weights: bool = True
) -> PreTrainedModel:
    """Load a one-label sequence classification model (its `score` head gives the reward) from a folder, offline.

    With `new_head` the folder may hold a causal language model: its LM head is dropped and a fresh score head is
    drawn from torch's default generator. `attention` names the implementation ("eager", "sdpa"), `weights` is as for
    `load_causal_lm`. UserError when the weights do not fit or there is more than one label.
    """
    from transformers import AutoModelForSequenceClassification

    options: dict[str, Any] = {"num_labels": 1} if new_head else {}
    if attention is not None:
        options["attn_implementation"] = attention
    if not weights:
        return _without_weights(AutoModelForSequenceClassification, path, dtype, **options)
    model, info = _load(AutoModelForSequenceClassification, path, dtype, **options)
    if model.config.num_labels != 1:
        raise UserError(f"{path}: a model with {model.config.num_labels} labels; a reward model has exactly one")
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if new_head:
        missing, unexpected = missing - _NEW_HEAD, unexpected - _LM_HEADS
    _check_keys(path, info, missing, unexpected)
    if not isinstance(getattr(model, "score", None), nn.Module):
        raise UserError(f"{path}: {type(model).__name__} has no score head; use a GPT-like classification model")
    return model


def check_positions(path: Path, key: str, length: int) -> None:
    """Refuse sequences longer than the model in folder `path` has positions; UserError with `key` and both numbers."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: holds no model's config.json ({reason}); give a model's folder") from error
    # The older architectures' n_positions answers to this name too.
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise UserError(f"{key}: {length} is more than the {positions} positions of {path}; give at most {positions}")


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model and its tokenizer as a Hugging Face folder; UserError when the disk does not take it."""
    with atomic.disk_errors(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def disable_dropout(model: nn.Module) -> None:
    """Switch every dropout of `model` off: losses become a function of weights and data alone."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # attention keeps its rate as a plain number
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _load(auto: Any, path: Path, dtype: torch.dtype, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the folder of a Hugging Face model")
    try:
        return auto.from_pretrained(  # type: ignore[no-any-return]
            path, dtype=dtype, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: cannot be loaded as {auto.__name__} ({reason}); give a model's folder") from error


def _without_weights(auto: Any, path: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """The model that the folder's config.json describes, with real buffers, and parameters of one number each.

    These are not on the meta device, whose tensors cannot be replaced by others.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    labels = {key: options.pop(key) for key in ("num_labels",) if key in options}
    config = AutoConfig.from_pretrained(path, local_files_only=True, **labels)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = auto.from_config(config, dtype=dtype, **options)
    model.tie_weights()
    placeholders: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                number = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
                module._parameters[name] = placeholders.setdefault(id(weight), nn.Parameter(number))
    return model.eval()


def _check_keys(path: Path, info: dict[str, Any], missing: set[str], unexpected: set[str]) -> None:
    faults = []
    for word, keys in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("wrong shape", {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}),
    ):
        if names := sorted(key for key in keys if not BUFFERS.search(key)):
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            faults.append(f"{word}: {', '.join(names[:5])}{more}")
    if faults:
        raise UserError(f"{path}: the weights do not fit the model ({'; '.join(faults)}); use a complete checkpoint")
