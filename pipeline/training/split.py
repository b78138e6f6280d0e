"""A causal language model in two parts at a layer, without copying weights.

The lower part (the trunk: embeddings and layers[:L-k]) is frozen by PPO, so its output at the cut is computed once
per token and kept; the policy, the reference and the value function are only tops over it (layers[L-k:], final norm,
language-model head). Both parts hold the very Parameter objects of the whole model: training the top trains the
model, which is then saved as it was loaded. Where every layer is trained there is no trunk: what is kept of a token is
its id, and the top is the whole model.

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
class Layout:
    """Where an architecture's base model keeps its parts."""

    layers: str
    norm: str
    embeddings: tuple[str, ...]
    """Modules that only the trunk needs."""
    alone: tuple[str, ...]
    """Modules of a layer whose output at a position nothing reads at another one: all but keys and values."""
    dropout: str | None = None
    positions: str | None = None
    """A learned position embedding: added to whatever enters the base model, so the top's must add nothing."""


_OF_LLAMA = Layout("layers", "norm", ("embed_tokens",), ("self_attn.q_proj", "self_attn.o_proj", "mlp"))
LAYOUTS = {
    "gpt_neox": Layout("layers", "final_layer_norm", ("embed_in",), ("attention.dense", "mlp"), dropout="emb_dropout"),
    "gptj": Layout("h", "ln_f", ("wte",), ("attn.q_proj", "attn.out_proj", "mlp"), dropout="drop"),
    "gpt2": Layout("h", "ln_f", ("wte",), ("attn.c_proj", "mlp"), dropout="drop", positions="wpe"),
    "llama": _OF_LLAMA,
    "qwen2": _OF_LLAMA,
}
"""By model type."""


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


class NoTrunk(nn.Module):
    """The trunk of a model that is trained whole: ids are what enters the top."""

    def forward(
        self,
        inputs: Tensor,  # (B, T) ids
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:  # (B, T) ids
        """The ids as they are."""
        return inputs

    def new_cache(self) -> SlotCache:
        """A cache without layers."""
        return SlotCache(0)


class Top(nn.Module):
    """layers[L-k:], the final norm and the language-model head; the whole model where all layers are trained."""

    def __init__(self, part: Part, head: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.head = head

    def forward(self, states: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """Logits (B, T, V) at every position of the cut's states: hidden states (B, T, H), or ids (B, T)."""
        logits: Tensor = self.head(self.part(states, *arguments, **named))
        return logits


@dataclass(frozen=True)
class Split:
    """A model in two parts that share its weights."""

    whole: PreTrainedModel
    trunk: Part | NoTrunk
    top: Top
    tied: bool
    """Whether the head is the input embedding; it is then frozen, or trained, with it."""

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

    With as many as the model has, all layers are trained and the embeddings are not; -1 trains these too. Both leave
    no trunk. The model must be on its device already: buffers are shared as they are. UserError for an architecture
    that is not known, or a number of layers that the model does not have.
    """
    kind = str(model.config.model_type)
    layout = LAYOUTS.get(kind)
    if layout is None:
        raise UserError(f"model.path: PPO does not know the architecture '{kind}'; it knows: {', '.join(LAYOUTS)}")
    base = model.base_model
    layers = list(getattr(base, layout.layers))
    if layers_unfrozen != -1 and not 1 <= layers_unfrozen <= len(layers):
        raise UserError(
            f"model.num_layers_unfrozen: {layers_unfrozen} does not fit the model's {len(layers)} layers; "
            f"give 1 to {len(layers)}, or -1 for all of them and the embeddings"
        )
    cut = 0 if layers_unfrozen == -1 else len(layers) - layers_unfrozen
    head = alias_tree(model.get_output_embeddings())
    tied = head.weight is model.get_input_embeddings().weight
    top = Top(_upper(base, layout, cut), head)
    unregister_buffers(top)
    model.requires_grad_(False)
    top.requires_grad_(True)
    if layers_unfrozen != -1:
        for name in (*layout.embeddings, layout.positions):
            if name:
                getattr(base, name).requires_grad_(False)  # a tied head is the same weight
    model.eval()
    trunk = _lower(base, layout, cut) if cut else NoTrunk()
    return Split(model, trunk.eval(), top.eval(), tied)


def _lower(base: nn.Module, layout: Layout, cut: int) -> Part:
    """Embeddings and layers[:cut], without the final norm."""
    body = _alias(base)
    body.config = _config_of_layers(body.config, 0, cut)
    setattr(body, layout.layers, nn.ModuleList(list(getattr(base, layout.layers))[:cut]))
    setattr(body, layout.norm, nn.Identity())
    return Part(body, takes_ids=True)


def _upper(base: nn.Module, layout: Layout, cut: int) -> Part:
    """layers[cut:] and the final norm; with the embeddings where nothing lies below."""
    body = _alias(base)
    layers = list(getattr(base, layout.layers))
    body.config = _config_of_layers(body.config, cut, len(layers))
    setattr(body, layout.layers, nn.ModuleList(_renumber(layer, i) for i, layer in enumerate(layers[cut:])))
    if not cut:
        return Part(body, takes_ids=True)
    for name in layout.embeddings:
        setattr(body, name, None)
    if layout.dropout:
        setattr(body, layout.dropout, nn.Identity())
    if layout.positions:
        setattr(body, layout.positions, _NoPositions())
    return Part(body, takes_ids=False)


def frozen_reference(split: Split, share: bool = True) -> Top:
    """A frozen copy of the top as it is now: the whole model where all of it is trained.

    What never changes (a tied head, embeddings) is shared, unless `share` is off.
    """
    memo = {id(weight): weight for weight in split.top.parameters() if share and not weight.requires_grad}
    return copy.deepcopy(split.top, memo).requires_grad_(False)


class _NoPositions(nn.Module):
    """Stands for a position embedding where positions were added already."""

    def forward(self, positions: Tensor) -> Tensor:
        return torch.zeros((), device=positions.device)  # without dimensions, it leaves the sum's dtype alone


def _alias(module: nn.Module) -> Any:
    """A copy of `module` that shares its parameters, buffers and children, but not the tables that name them.

    Nor the tables of hooks: what a wrapper of the one hangs into it is not called by the other.
    """
    twin = copy.copy(module)
    for name, table in module.__dict__.items():
        if name in ("_parameters", "_buffers", "_modules") or "_hooks" in name:
            twin.__dict__[name] = copy.copy(table)
    return twin


def alias_tree(module: nn.Module) -> Any:
    """`_alias`, with the children aliased too."""
    twin = _alias(module)
    for name, child in module.named_children():
        twin._modules[name] = alias_tree(child)
    return twin


def copied(module: nn.Module, dtype: torch.dtype) -> Any:
    """A frozen copy of `module` in `dtype`, weight by weight, so that memory holds no third one."""
    twin = alias_tree(module)
    for part in twin.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(weight.detach().to(dtype, copy=True), requires_grad=False)
    return twin


def _renumber(layer: nn.Module, index: int) -> nn.Module:
    """An alias of `layer` that keeps its keys and values at place `index` of a cache."""
    twin: nn.Module = alias_tree(layer)
    for module in twin.modules():
        if hasattr(module, "layer_idx"):
            module.__dict__["layer_idx"] = index
    return twin


def unregister_buffers(module: nn.Module) -> None:
    """Make buffers plain attributes: rotary tables must stay float32 when DeepSpeed casts the top to bf16."""
    for name, child in list(module.named_children()):
        if not list(child.parameters()) and list(child.buffers()):
            twin = alias_tree(child)
            unregister_buffers(twin)
            del module._modules[name]
            module.__dict__[name] = twin
        else:
            unregister_buffers(child)
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
