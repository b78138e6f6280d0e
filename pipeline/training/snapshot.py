"""The state of models, optimisers and generators as copies in host memory, which are written while training goes on."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.training.sharding import moving

WEIGHTS, OPTIMIZER, SCHEDULER = "model{}.safetensors", "optimizer{}.bin", "scheduler{}.bin"
SCALER = "scaler.pt"
GENERATORS = "random_states_{}.bin"

Files = dict[str, Any]
"""File name to content: named tensors for .safetensors, else plain values and tensors."""


def copies(value: Any) -> Any:
    """`value` with every tensor in it, however deep, copied to host memory of its own."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, Mapping):
        return {key: copies(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copies(item) for item in value)
    return value


def can_copy(accelerator: Accelerator) -> bool:
    """Whether each rank holds the whole state. With DeepSpeed it does not: accelerate saves and loads it there."""
    return accelerator.distributed_type in {
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
    }


def snapshot(accelerator: Accelerator, rank: int) -> Files:
    """What this rank writes: rank 0 weights, optimisers, schedulers and the scaler; every rank its generators."""
    files: Files = {GENERATORS.format(rank): {**_generators(), "accumulated": accelerator.step}}
    if rank == 0:
        for place, model in enumerate(accelerator._models):
            module = accelerator.unwrap_model(model)
            files[WEIGHTS.format(_number(place))] = copies(_without_frozen(module, module.state_dict()))
        for place, optimizer in enumerate(accelerator._optimizers):
            files[OPTIMIZER.format(_number(place))] = copies(optimizer.state_dict())
        for place, scheduler in enumerate(accelerator._schedulers):
            files[SCHEDULER.format(_number(place))] = copies(scheduler.state_dict())
        if accelerator.scaler is not None:
            files[SCALER] = copies(accelerator.scaler.state_dict())
    return files


def restore(accelerator: Accelerator, rank: int, folder: Path) -> None:
    """Put what `snapshot` took back in place, from the folder that it was written to."""
    for place, model in enumerate(accelerator._models):
        _load_without_frozen(accelerator.unwrap_model(model), folder / WEIGHTS.format(_number(place)))
    for place, optimizer in enumerate(accelerator._optimizers):
        optimizer.load_state_dict(read_plain(folder / OPTIMIZER.format(_number(place))))
    for place, scheduler in enumerate(accelerator._schedulers):
        scheduler.load_state_dict(read_plain(folder / SCHEDULER.format(_number(place))))
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(read_plain(folder / SCALER))
    states = read_plain(folder / GENERATORS.format(rank))
    accelerator.step = states["accumulated"]
    _set_generators(states)


def best_weights(accelerator: Accelerator, rank: int) -> Files:
    """The models' weights alone, on rank 0; to be called by every rank (ZeRO-3 gathers them)."""
    files = {}
    for place, model in enumerate(accelerator._models):
        state = accelerator.get_state_dict(model)
        if rank == 0:
            files[WEIGHTS.format(_number(place))] = copies(_without_frozen(accelerator.unwrap_model(model), state))
    return files


def load_weights(accelerator: Accelerator, folder: Path) -> None:
    """Give the models the weights that `best_weights` took; to be called by every rank."""
    for place, model in enumerate(accelerator._models):
        file = folder / WEIGHTS.format(_number(place))
        module = accelerator.unwrap_model(model)
        if not _partitioned(module):
            _load_without_frozen(module, file)
            continue
        import deepspeed

        weights = load_file(file)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0), torch.no_grad():
                    if accelerator.is_main_process:
                        parameter.copy_(weights[name])


def write_file(path: Path, content: Any) -> None:
    """Write one of `Files`."""
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)


def read_plain(path: Path) -> Any:
    """A file of plain values and tensors; nothing in it is executed."""
    return torch.load(path, map_location="cpu", weights_only=True)


def _generators() -> dict[str, Any]:
    numpy: Any = np.random.get_state(legacy=False)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {"key": numpy["state"]["key"].tolist(), "pos": int(numpy["state"]["pos"])}},
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _set_generators(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    numpy = states["numpy"]
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": np.array(numpy["state"]["key"], dtype=np.uint32)}})
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def _without_frozen(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state without the weights that stay as they are: they come from where training started.

    Those that move without gradients (ILQL's target heads) are in it.
    """
    wanted = moving(module)
    frozen = {
        name
        for name, weight in module.named_parameters(remove_duplicate=False)
        if not weight.requires_grad and weight not in wanted
    }
    return {name: value for name, value in state.items() if name not in frozen}


def _load_without_frozen(module: nn.Module, file: Path) -> None:
    """Load such a state; RuntimeError when it is another module's."""
    state = load_file(file)
    wanted = _without_frozen(module, module.state_dict()).keys()
    if state.keys() != wanted:
        raise RuntimeError(f"{file}: holds other weights than are trained: {sorted(state.keys() ^ wanted)[:5]}")
    module.load_state_dict(state, strict=False)


def _partitioned(module: nn.Module) -> bool:
    """Whether ZeRO-3 has spread the parameters over the ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def _number(place: int) -> str:
    return f"_{place}" if place else ""
