"""Low-rank adapters on the trained layers (LoRA, Hu et al. 2021, arXiv:2106.09685), through peft.

They are put into the top alone: what else holds the model's weights (the whole model, a reference that shares them)
goes on without adapters. What is saved has them merged: W + alpha / rank * B A.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.config.schema import LoRA
from pipeline.errors import UserError, nearest
from pipeline.training.split import Top, alias_tree

if TYPE_CHECKING:
    from pipeline.training.split import Split


def shared_reference(top: Top) -> Top:
    """The top without the adapters that it is to get, over the same weights; to be made before them."""
    twin: Top = alias_tree(top)
    return twin


def add_adapters(top: Top, lora: LoRA, seed: int) -> None:
    """Put adapters of `lora.rank` on the top's linear modules, and freeze all else in it; rank 0 changes nothing.

    A starts from Kaiming's uniform distribution under a seed of its own and B at 0, so that the model is the same at
    first. UserError without peft, and for targets that are no linear modules of the trained layers.
    """
    if not lora.rank:
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(
            "model.lora.rank: LoRA needs the package peft; install it (pip install peft), or set rank to 0"
        ) from error

    targets = _targets(top, lora.targets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0)  # type: ignore[arg-type]
    top.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # peft then does what is right
        torch.manual_seed(seed)
        inject_adapter_in_model(config, top.part)


def merged_weights(top: Top) -> dict[int, Tensor]:
    """The merged weights of the top's adapted modules in their dtype, by the id of the weight that they replace."""
    adapted: list[Any] = [module for module in top.modules() if _is_adapted(module)]
    return {id(layer.base_layer.weight): _merged(layer) for layer in adapted}


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    """W + alpha / rank * B A, summed in float32 at least."""
    weight: Tensor = layer.base_layer.weight
    delta: Tensor = layer.get_delta_weight("default")
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + delta.to(wide)).to(weight.dtype)


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def _targets(top: Top, wanted: tuple[str, ...]) -> list[str]:
    """The full names of the linear modules that `wanted` (their last names; empty is all of them) stands for."""
    from transformers.pytorch_utils import Conv1D

    linear = [name for name, module in top.part.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    last = sorted({name.rsplit(".", 1)[-1] for name in linear})
    for name in wanted:
        if name not in last:
            raise UserError(
                f"model.lora.targets: the trained layers have no linear module '{name}'{nearest(name, last)}; there "
                f"are: {', '.join(last)}"
            )
    return [name for name in linear if not wanted or name.rsplit(".", 1)[-1] in wanted]


def whole_with_merged(split: Split, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """The whole model as it would be loaded from what is saved: plain modules, adapters merged, every weight a copy.

    What is trained stays as it is. Tied weights stay tied.
    """
    merged = merged_weights(split.top)
    twin = alias_tree(split.whole)
    copies: dict[int, nn.Parameter] = {}
    for module in twin.modules():
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            if id(weight) not in copies:
                value = merged.get(id(weight), weight).detach().to(device, dtype, copy=True)
                copies[id(weight)] = nn.Parameter(value, requires_grad=False)
            module._parameters[name] = copies[id(weight)]
    return twin
