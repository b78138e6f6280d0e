"""Modules that DeepSpeed trains: handed over exactly, and under ZeRO-3 spread over the ranks weight by weight.

DeepSpeed rounds a module's weights to 16 bits and makes its float32 masters from what is left. Here the masters get
the weights as they were. Under ZeRO-3 rank 0 alone reads the checkpoint of SFT, a reward model or ILQL, into the host's
memory, and no device holds all of its weights before they are asked for (`whole_weights`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.training.distributed import compute_dtype, shards_weights, uses_deepspeed

PORTION = 2**28
"""Weights that are whole on a device at a time while they are spread; a larger matrix comes alone."""

Exact = dict[nn.Parameter, Tensor]
"""What weights were before they were rounded: under ZeRO-3 this rank's share of it, else the whole."""


def loads_weights(accelerator: Accelerator) -> bool:
    """Whether this rank is to read a checkpoint whose weights all go to `prepare`: under ZeRO-3 rank 0 alone."""
    return accelerator.is_main_process or not shards_weights(accelerator)


def prepare(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, beside: Iterable[nn.Parameter] = ()
) -> tuple[Any, Any]:
    """Module and optimiser as accelerate wraps them; the masters, and what moves without gradients, stay exact.

    Under ZeRO-3 all weights are rank 0's, also those `beside` the module, which end whole on every rank.
    """
    kept = {weight: weight.data for weight in moving(module)}
    if shards_weights(accelerator):
        buffers_to(module, accelerator.device)  # DeepSpeed leaves modules that it finds spread where they are
        exact = spread(accelerator, module)
        dtype = compute_dtype(accelerator)
        for weight in beside:
            weight.data = _from_first(accelerator, weight).to(dtype)
    else:
        exact = {weight: weight.data for weight in module.parameters() if _is_rounded(accelerator, weight)}
    wrapped, prepared = accelerator.prepare(module, optimizer)
    for weight, value in exact.items():
        _set_master(weight, value)
    if not shards_weights(accelerator):
        for weight, value in kept.items():
            weight.data = value.to(weight.device)
    return wrapped, prepared


def buffers_to(module: nn.Module, device: torch.device) -> None:
    """Move the module's buffers, and nothing else of it, to `device`."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)


def moving(module: nn.Module) -> set[nn.Parameter]:
    """Weights that change without gradients, as ILQL's target heads do.

    The part that they are in says so by an attribute `moves_without_gradients`.
    """
    parts = (part for part in module.modules() if getattr(part, "moves_without_gradients", False))
    return {weight for part in parts for weight in part.parameters()}


def spread(accelerator: Accelerator, module: nn.Module) -> Exact:
    """Make the module's weights ZeRO-3's, from rank 0's and in 16 bits where training is; what moves without gradients
    stays as wide as it is. Returns this rank's share of what the rounded ones were."""
    import deepspeed

    dtype, wide = compute_dtype(accelerator), moving(module)
    settings = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    config = {"train_batch_size": accelerator.num_processes, "zero_optimization": settings}
    exact: Exact = {}
    for portion in _portions(list(module.parameters())):
        for weight in portion:
            value = _from_first(accelerator, weight)
            if _is_rounded(accelerator, weight):
                exact[weight] = _own_part(accelerator, value)
            weight.data = value if weight in wide else value.to(dtype)
        deepspeed.zero.Init(module=nn.ParameterList(portion), config_dict_or_path=config)
    return exact


@contextlib.contextmanager
def own_share(weight: Any) -> Iterator[Tensor]:
    """What this rank holds of a weight that has no gradient, to change it in place: under ZeRO-3 a share, flat and
    padded, cut as any other weight's of that shape."""
    if not hasattr(weight, "ds_tensor"):
        yield weight.data
        return
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    yield weight.ds_tensor
    if weight.ds_status == ZeroParamStatus.AVAILABLE:  # small ones stay gathered between forwards, and are now old
        weight.partition()


def exact_share(weight: nn.Parameter) -> Tensor:
    """The same of a trained weight, to read: under ZeRO-3 from its float32 master, else the weight itself, which under
    ZeRO-2 has 16 bits."""
    if not hasattr(weight, "ds_tensor"):
        return weight.detach()
    from deepspeed.utils import safe_get_local_fp32_param

    share: Tensor = safe_get_local_fp32_param(weight)
    return share


def _is_rounded(accelerator: Accelerator, weight: nn.Parameter) -> bool:
    """Whether DeepSpeed keeps a master of the weight that would be less than the weight is."""
    narrow = compute_dtype(accelerator) != torch.float32
    return uses_deepspeed(accelerator) and narrow and weight.requires_grad and weight.dtype == torch.float32


def _from_first(accelerator: Accelerator, weight: nn.Parameter) -> Tensor:
    """Rank 0's value of a weight, on this rank's device."""
    if accelerator.is_main_process:
        value = weight.data.to(accelerator.device).contiguous()
    else:
        value = torch.empty(weight.shape, dtype=weight.dtype, device=accelerator.device)
    dist.broadcast(value.view(-1).view(torch.uint8), 0)  # as bytes: not every backend knows every dtype
    return value


def _portions(weights: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """In order, as many together as are at most PORTION numbers."""
    portion: list[nn.Parameter] = []
    for weight in weights:
        if portion and sum(each.numel() for each in portion) + weight.numel() > PORTION:
            yield portion
            portion = []
        portion.append(weight)
    if portion:
        yield portion


def _own_part(accelerator: Accelerator, value: Tensor) -> Tensor:
    """This rank's part of a weight as ZeRO-3 cuts it: flat, in equal parts, the last one filled up with zeros."""
    world, rank = accelerator.num_processes, accelerator.process_index
    size = -(-value.numel() // world)
    part = value.new_zeros(size)
    mine = value.view(-1)[rank * size : (rank + 1) * size]
    part[: len(mine)] = mine
    return part


def _set_master(weight: nn.Parameter, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(weight, "ds_tensor"):
        safe_set_local_fp32_param(weight, value)
    else:
        safe_set_full_fp32_param(weight, value)
