"""A causal language model in two parts at a layer, without copying weights.

The lower part (the trunk: embeddings and layers[:L-k]) is frozen by PPO, so its output at the cut is computed once
per token and kept; the policy, the reference and the value function are only tops over it (layers[L-k:], final norm,
language-model head). Both parts hold the very Parameter objects of the whole model: training the top trains the
model, which is then saved as it was loaded.

The parts are shallow copies of the model's own modules, so each architecture's forward stays Hugging Face's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.training.kv_cache import SlotCache

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


@dataclass(frozen=True)
class _Layout:
    """Where an architecture's base model keeps its parts."""

    layers: str
    norm: str
    embeddings: tuple[str, ...]
    """Modules that only the trunk needs."""
    dropout: str | None = None
    positions: str | None = None
    """A learned position embedding: added to whatever enters the base model, so the top's must add nothing."""


_LAYOUTS = {
    "gpt_neox": _Layout("layers", "final_layer_norm", ("embed_in",), dropout="emb_dropout"),
    "gptj": _Layout("h", "ln_f", ("wte",), dropout="drop"),
    "gpt2": _Layout("h", "ln_f", ("wte",), dropout="drop", positions="wpe"),
    "llama": _Layout("layers", "norm", ("embed_tokens",)),
    "qwen2": _Layout("layers", "norm", ("embed_tokens",)),
}


class Part(nn.Module):
    """One part of the base model: from ids (trunk) or hidden states (top) to hidden states."""

    def __init__(self, body: nn.Module, takes_ids: bool) -> None:
        super().__init__()
        self.body = body
        self._key = "input_ids" if takes_ids else "inputs_embeds"

    def forward(
        self,
        inputs: Tensor,  # (B, T) ids, or (B, T, H)
        attention_mask: Tensor | None = None,  # (B, past + T), 1 where real
        position_ids: Tensor | None = None,  # (B, T)
        cache: Cache | None = None,
    ) -> Tensor:  # (B, T, H)
        """Hidden states behind the part's last layer, and behind the final norm where the part is the top."""
        hidden: Tensor = self.body(
            **{self._key: inputs},
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return hidden

    def new_cache(self) -> SlotCache:
        """An empty key-value cache for this part's layers; it is to be told its size."""
        config: Any = self.body.config
        return SlotCache(int(config.num_hidden_layers))


class Top(nn.Module):
    """layers[L-k:], the final norm and the language-model head."""

    def __init__(self, part: Part, head: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.head = head

    def forward(self, states: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """Logits (B, T, V) at every position of the cut's hidden states (B, T, H)."""
        logits: Tensor = self.head(self.part(states, *arguments, **named))
        return logits


@dataclass(frozen=True)
class Split:
    """A model in two parts that share its weights."""

    whole: PreTrainedModel
    trunk: Part
    top: Top
    tied: bool
    """Whether the head is the input embedding; it is then frozen with it."""

    @property
    def device(self) -> torch.device:
        device: torch.device = self.whole.device
        return device

    @property
    def hidden_size(self) -> int:
        return int(self.whole.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.whole.config.vocab_size)


def split_model(model: PreTrainedModel, layers_unfrozen: int) -> Split:
    """Split `model` below its top `layers_unfrozen` layers; freeze the trunk, leave the top trainable.

    The model must be on its device already: buffers are shared as they are. UserError for an architecture that is
    not known, or a number of layers that leaves no trunk.
    """
    kind = str(model.config.model_type)
    layout = _LAYOUTS.get(kind)
    if layout is None:
        raise UserError(f"model.path: PPO does not know the architecture '{kind}'; it knows: {', '.join(_LAYOUTS)}")
    base = model.base_model
    layers = list(getattr(base, layout.layers))
    if not 1 <= layers_unfrozen < len(layers):
        raise UserError(
            f"model.num_layers_unfrozen: {layers_unfrozen} is not supported by PPO yet; "
            f"give 1 to {len(layers) - 1}, fewer than the model's {len(layers)} layers"
        )
    cut = len(layers) - layers_unfrozen

    lower = _alias(base)
    lower.config = _config_of_layers(model.config, 0, cut)
    setattr(lower, layout.layers, nn.ModuleList(layers[:cut]))
    setattr(lower, layout.norm, nn.Identity())

    upper = _alias(base)
    upper.config = _config_of_layers(model.config, cut, len(layers))
    setattr(upper, layout.layers, nn.ModuleList(_renumber(layer, i) for i, layer in enumerate(layers[cut:])))
    for name in layout.embeddings:
        setattr(upper, name, None)
    if layout.dropout:
        setattr(upper, layout.dropout, nn.Identity())
    if layout.positions:
        setattr(upper, layout.positions, _NoPositions())

    head = _alias_tree(model.get_output_embeddings())
    tied = head.weight is model.get_input_embeddings().weight
    top = Top(Part(upper, takes_ids=False), head)
    _unregister_buffers(top)
    model.requires_grad_(False)
    top.requires_grad_(True)
    if tied:
        head.requires_grad_(False)
    model.eval()
    return Split(model, Part(lower, takes_ids=True).eval(), top.eval(), tied)


def frozen_reference(split: Split) -> Top:
    """A frozen copy of the top as it is now; a tied head, which never changes, is shared."""
    memo = {id(parameter): parameter for parameter in split.top.head.parameters()} if split.tied else {}
    return copy.deepcopy(split.top, memo).requires_grad_(False)


class _NoPositions(nn.Module):
    """Stands for a position embedding where positions were added already."""

    def forward(self, positions: Tensor) -> Tensor:
        return torch.zeros((), device=positions.device)  # without dimensions, it leaves the sum's dtype alone


def _alias(module: nn.Module) -> Any:
    """A copy of `module` that shares its parameters, buffers and children, but not the tables that name them."""
    twin = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[table] = dict(module.__dict__[table])
    return twin


def _alias_tree(module: nn.Module) -> Any:
    """`_alias`, with the children aliased too."""
    twin = _alias(module)
    for name, child in module.named_children():
        twin._modules[name] = _alias_tree(child)
    return twin


def _renumber(layer: nn.Module, index: int) -> nn.Module:
    """An alias of `layer` that keeps its keys and values at place `index` of a cache."""
    twin: nn.Module = _alias_tree(layer)
    for module in twin.modules():
        if hasattr(module, "layer_idx"):
            module.__dict__["layer_idx"] = index
    return twin


def _unregister_buffers(module: nn.Module) -> None:
    """Make buffers plain attributes: rotary tables must stay float32 when DeepSpeed casts the top to bf16."""
    for name, child in list(module.named_children()):
        if not list(child.parameters()) and list(child.buffers()):
            twin = _alias_tree(child)
            _unregister_buffers(twin)
            del module._modules[name]
            module.__dict__[name] = twin
        else:
            _unregister_buffers(child)
    for name, buffer in list(module._buffers.items()):
        del module._buffers[name]
        module.__dict__[name] = buffer


def _config_of_layers(config: Any, start: int, stop: int) -> Any:
    """The configuration of a model that has only layers[start:stop]; caches and masks are made from it."""
    part = copy.deepcopy(config)
    part.num_hidden_layers = stop - start
    if getattr(part, "layer_types", None):
        part.layer_types = list(config.layer_types)[start:stop]
    return part
