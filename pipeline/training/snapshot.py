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
from torch import Tensor

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
            files[WEIGHTS.format(_number(place))] = copies(dict(accelerator.unwrap_model(model).state_dict()))
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
        accelerator.unwrap_model(model).load_state_dict(load_file(folder / WEIGHTS.format(_number(place))))
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
    states = [accelerator.get_state_dict(model) for model in accelerator._models]
    if rank != 0:
        return {}
    return {WEIGHTS.format(_number(place)): copies(dict(state)) for place, state in enumerate(states)}


def load_weights(accelerator: Accelerator, folder: Path) -> None:
    """Give the models the weights that `best_weights` took; to be called by every rank."""
    for place, model in enumerate(accelerator._models):
        weights = load_file(folder / WEIGHTS.format(_number(place)))
        module = accelerator.unwrap_model(model)
        if not _partitioned(module):
            module.load_state_dict(weights)
            continue
        import deepspeed

        for name, parameter in module.named_parameters():
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


def _partitioned(module: torch.nn.Module) -> bool:
    """Whether ZeRO-3 has spread the parameters over the ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def _number(place: int) -> str:
    return f"_{place}" if place else ""
