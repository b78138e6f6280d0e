"""What a checkpoint holds of the trained module: what is trained. The frozen rest comes from where training started."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

_WEIGHTS = "model.safetensors"


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """The trained weights by name, each once, without gradients; not copies."""
    return {name: weight.detach() for name, weight in module.named_parameters() if weight.requires_grad}


def load_trained(module: nn.Module, state: Mapping[str, Tensor], where: Any) -> None:
    """Put back what `trained_state` gave; RuntimeError, naming `where`, for other weights than are trained."""
    if state.keys() != trained_state(module).keys():
        raise RuntimeError(f"{where}: holds other weights than are trained")
    module.load_state_dict(state, strict=False)


def keep_trained_only(accelerator: Accelerator) -> None:
    """Make `accelerator` save and load only the weights that are trained (DeepSpeed saves all of its module)."""

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        for place, model in enumerate(models[: len(weights)]):  # DeepSpeed's are not among the weights
            weights[place] = trained_state(accelerator.unwrap_model(model))

    def load(models: list[nn.Module], folder: str) -> None:
        file = Path(folder) / _WEIGHTS
        if file.is_file():  # DeepSpeed has files of its own
            load_trained(accelerator.unwrap_model(models.pop()), load_file(file), file)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
