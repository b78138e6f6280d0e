"""What differs between one process, DDP, and DeepSpeed's ZeRO stages, so that nothing else needs to know."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from pipeline.errors import UserError

MIN_LOSS_SCALE = 1.0
"""Of fp16: gradients that overflow even without being scaled up are no matter of the scale."""
_gathered: ContextVar[bool] = ContextVar("gathered", default=False)
_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of frozen weights and of what is saved. UserError for a precision that is not supported."""
    precision = str(accelerator.mixed_precision)
    if precision not in _DTYPES:
        raise UserError(f"train.accelerate_config: mixed_precision {precision} is not supported; take no, bf16 or fp16")
    return _DTYPES[precision]


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed drives the training."""
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether the trained module's weights are spread over the ranks (ZeRO-3)."""
    return uses_deepspeed(accelerator) and accelerator.state.deepspeed_plugin.zero_stage == 3


def configure_deepspeed(accelerator: Accelerator, micro_batch_size: int, max_grad_norm: float) -> None:
    """Give DeepSpeed what the run's configuration says, in place of what its config file may."""
    if uses_deepspeed(accelerator):
        if not accelerator.state.deepspeed_plugin.zero_stage:
            raise UserError(
                "accelerate_config: DeepSpeed's zero_stage 0 has no float32 masters of weights; take 1, 2, 3, or ddp"
            )
        plugin = accelerator.state.deepspeed_plugin.deepspeed_config
        plugin["train_micro_batch_size_per_gpu"] = micro_batch_size
        plugin["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps
        plugin["gradient_clipping"] = max_grad_norm
        # Else gradients are summed over forwards, and over ranks, in the 16 bits that they are computed in.
        plugin.setdefault("data_types", {})["grad_accum_dtype"] = "fp32"
        plugin["communication_data_type"] = "fp32"
        # Else ZeRO-3 refuses to give its weights away, as the best ones are to be kept.
        plugin["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True


def whole_weights(accelerator: Accelerator, module: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Contexts in which every rank holds all of the weights of `module`, a part of what was prepared, to read.

    Under ZeRO-3 a forward of the module gathers layer by layer, which every rank must do at the same time; decoding
    ends on each rank when it ends. So weights are gathered once, used through modules that the engine does not know,
    and released. To be entered by every rank, at the same time; elsewhere than under ZeRO-3 there is nothing to do.
    Where they would crowd a GPU, the optimiser's state is on the host meanwhile.
    """
    if not shards_weights(accelerator):
        return contextlib.nullcontext

    @contextlib.contextmanager
    def gathered() -> Iterator[None]:
        import deepspeed

        weights = list(module.parameters())
        state = [(tensor, tensor.device) for tensor in state_in_the_way(accelerator, weights)]
        for tensor, _ in state:
            tensor.data = tensor.data.to("cpu")
        token = _gathered.set(True)
        try:
            with deepspeed.zero.GatheredParameters(weights):
                yield
        finally:
            _gathered.reset(token)
            for tensor, device in state:
                tensor.data = tensor.data.to(device)

    return gathered


def in_whole_weights() -> bool:
    """Whether `whole_weights` holds: no forward meets the other ranks then, and each may make as many as it likes."""
    return _gathered.get()


def state_in_the_way(accelerator: Accelerator, weights: Sequence[Any]) -> list[Tensor]:
    """This rank's share of masters and moments, where whole `weights` would take half of what the GPU has left.

    The other half is for what they are used for. No step is taken, so nothing asks for that state, until it is back.
    """
    if accelerator.device.type != "cuda":
        return []
    size = sum(weight.ds_numel * weight.element_size() for weight in weights if hasattr(weight, "ds_numel"))
    own = torch.cuda.memory_reserved(accelerator.device) - torch.cuda.memory_allocated(accelerator.device)
    left = torch.cuda.mem_get_info(accelerator.device)[0] + own  # others may be on the GPU, too
    if size <= left / 2:
        return []
    state = [item for optimizer in accelerator._optimizers for item in optimizer.state.items()]
    moments = [value for _, values in state for value in values.values() if isinstance(value, Tensor) and value.ndim]
    return [*(master for master, _ in state), *moments]


def backward(accelerator: Accelerator, loss: Tensor) -> None:
    """`accelerator.backward`; UserError when DeepSpeed's loss scale cannot fall any more."""
    try:
        accelerator.backward(loss)
    except Exception as error:
        if "loss scale already at minimum" in str(error):
            raise _scale_error() from error
        raise


def may_fuse(accelerator: Accelerator) -> bool:
    """Whether AdamW may be torch's fused kernel. That takes fp16's scaler in and leaves steps out by itself, so that
    accelerate, which counts calls, would not see it."""
    return accelerator.scaler is None


def was_skipped(accelerator: Accelerator, optimizer: Any) -> bool:
    """Whether the optimiser step just made was left out: an fp16 gradient overflowed, and the loss scale was lowered.

    That is how a scale is found, and no fault; UserError when it falls below MIN_LOSS_SCALE.
    """
    if accelerator.mixed_precision != "fp16" or not optimizer.step_was_skipped:
        return False
    if accelerator.scaler is not None and accelerator.scaler.get_scale() < MIN_LOSS_SCALE:
        raise _scale_error()
    return True


def _scale_error() -> UserError:
    return UserError(
        "train: fp16 gradients overflow at the smallest loss scale; take an accelerate_config in bf16, or lower "
        "optimizer.lr"
    )
