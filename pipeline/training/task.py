"""One optimiser step of supervised training, exact whatever the ranks and pieces: sums, divided by a global count.

The gradient is that of the sum of losses over all ranks' examples, divided by the sum of their weights. How a batch is
spread over ranks, and cut into forwards, changes rounding only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import Tensor, nn

from pipeline.training.batches import E, Sized, split_by_tokens, split_into
from pipeline.training.distributed import backward as backward_pass
from pipeline.training.distributed import uses_deepspeed

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Task(Generic[E]):
    """What is trained: examples become tensors, a module turns these into sums.

    The module's forward takes what `collate` returns and gives two tensors: the sum of the losses, (), to be
    backpropagated, and sums for people to look at, (S,) float64 and detached.
    """

    collate: Callable[[Sequence[Any]], tuple[Tensor, ...]]
    """Rows to tensors of one forward; the first are the ids (B, T)."""
    weight: Callable[[E], int]
    """How many terms an example adds to the global mean (response tokens; 1 for a pair)."""
    statistics: tuple[str, ...] = ("losses/loss",)
    """Names of the first of the module's sums, as metrics show them; they are divided by the weights' sum, too. Any
    that follow are for evaluations alone."""
    rows: Callable[[Sequence[E]], Sequence[Sized]] | None = None
    """Where rows are not examples: how a rank's examples become rows (packing)."""


@dataclass(frozen=True)
class StepSums:
    """What this rank saw in an optimiser step."""

    means: Tensor
    """The module's sums divided by the global weight, (S,) float64: all ranks' add up to the means."""
    tokens: int
    """Of its examples."""
    padded: int
    """Of the rows that were computed, padding included."""


def backward(
    accelerator: Accelerator, wrapped: nn.Module, task: Task[E], batch: Sequence[E], max_tokens: int
) -> StepSums:
    """Add the gradient of a global batch's mean loss, in pieces of at most `max_tokens` padded tokens."""
    world = accelerator.num_processes
    count = sum(task.weight(example) for example in batch)
    mine = batch[accelerator.process_index :: world]
    pieces, weighs = _pieces(accelerator, task, batch, max_tokens)
    total: Tensor | None = None
    padded = 0
    for number, (piece, weight) in enumerate(zip(pieces, weighs, strict=True), 1):
        with _accumulating(accelerator, wrapped, last=number == len(pieces)):
            tensors = to_device(task.collate(piece), accelerator.device)
            loss, sums = wrapped(*tensors)
            # The ranks' gradients are averaged, so that a sum over ranks needs a factor of their number.
            backward_pass(accelerator, loss * (weight * world / max(1, count)))
        part = sums * (weight / max(1, count))
        total = part if total is None else total + part
        padded += tensors[0].numel() if weight else 0
    assert total is not None
    return StepSums(total, sum(example.length for example in mine), padded)


@torch.no_grad()
def sum_over(
    accelerator: Accelerator, wrapped: nn.Module, task: Task[E], examples: Sequence[E], max_tokens: int
) -> Tensor:
    """The module's sums (S,), float64 on the CPU, over all examples, each computed by one of the ranks."""
    training = wrapped.training
    wrapped.eval()
    ordered = sorted(examples, key=lambda example: -example.length)
    total: Tensor | None = None
    for piece, weight in zip(*_pieces(accelerator, task, ordered, max_tokens), strict=True):
        part = wrapped(*to_device(task.collate(piece), accelerator.device))[1] * weight
        total = part if total is None else total + part
    wrapped.train(training)
    assert total is not None
    reduced: Tensor = accelerator.reduce(total, "sum")
    return reduced.cpu()


def to_device(tensors: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """All of them on `device`."""
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


def _pieces(
    accelerator: Accelerator, task: Task[E], batch: Sequence[E], max_tokens: int
) -> tuple[list[list[Any]], list[float]]:
    """This rank's forwards, and what each weighs: 1, or 0 for one that is only there to keep the ranks in step.

    A rank without an example takes part with one of another's. DeepSpeed's ranks meet in each backward pass, so there
    all take as many as the one that needs most.
    """
    world = accelerator.num_processes

    def of_rank(index: int) -> list[list[Any]]:
        mine = batch[index::world]
        return split_by_tokens(task.rows(mine) if task.rows and mine else mine, max_tokens)

    pieces = of_rank(accelerator.process_index)
    needed = max(len(of_rank(index)) for index in range(world)) if uses_deepspeed(accelerator) else 1
    pieces = split_into(pieces, needed)
    spare = list(task.rows(batch[:1]) if task.rows else batch[:1])
    missing = max(0, needed - len(pieces))
    return [*[spare] * missing, *pieces], [*[0.0] * missing, *[1.0] * len(pieces)]


def _accumulating(accelerator: Accelerator, wrapped: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Only the last piece's backward pass exchanges gradients (and, with DeepSpeed, takes the step)."""
    if uses_deepspeed(accelerator):
        accelerator.sync_gradients = last
        return contextlib.nullcontext()
    return contextlib.nullcontext() if last else accelerator.no_sync(wrapped)
