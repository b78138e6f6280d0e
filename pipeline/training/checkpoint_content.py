"""What a checkpoint holds of the trained module: what is trained. The frozen rest comes from where training started."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

_WEIGHTS = "model.safetensors"


def keep_trained_only(accelerator: Accelerator) -> None:
    """Make `accelerator` save and load only the weights that are trained (DeepSpeed saves all of its module)."""

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        for place, model in enumerate(models[: len(weights)]):  # DeepSpeed's are not among the weights
            trained = {
                name for name, weight in accelerator.unwrap_model(model).named_parameters() if weight.requires_grad
            }
            weights[place] = {name: value for name, value in weights[place].items() if _plain(name) in trained}

    def load(models: list[nn.Module], folder: str) -> None:
        file = Path(folder) / _WEIGHTS
        if not file.is_file():  # DeepSpeed's
            return
        model = accelerator.unwrap_model(models.pop())
        loaded = {_plain(name): value for name, value in load_file(file).items()}
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        if trained != loaded.keys():
            raise RuntimeError(f"{file}: holds other weights than are trained")
        model.load_state_dict(loaded, strict=False)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _plain(name: str) -> str:
    """A weight's name without the data-parallel wrapper's prefix."""
    return name.removeprefix("module.")
