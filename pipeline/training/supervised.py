"""What SFT and reward-model training share: batches by length, exact global averages, the loop over optimiser steps.

Started as one process or by `accelerate launch` with several. The batch size is global, every rank computes the
same plan of batches and takes its rows of each, and a loss is the sum over a rank's rows divided by the count over
all ranks' rows: one process and several give the same weights up to rounding.
"""

from __future__ import annotations

import logging
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pipeline.config.methods import Supervised
from pipeline.errors import UserError
from pipeline.run.work import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

MICRO_BATCH_TOKENS = 8192
"""Padded tokens that one forward may hold; larger batches are accumulated, which does not change the result."""
BUCKET_BATCHES = 16
"""Batches are cut from this many batches' worth of examples, sorted by length: little padding, still random."""
MAX_GRAD_NORM = 1.0
BETAS = (0.9, 0.95)

_log = logging.getLogger(__name__)


class Sized(Protocol):
    """An example that knows how long its padded row will be."""

    @property
    def length(self) -> int: ...


E = TypeVar("E", bound=Sized)


@dataclass(frozen=True)
class Task(Generic[E]):
    """What is trained: examples become tensors, a module turns them into the sum of losses.

    `weight` is how many terms an example adds to the global mean (response tokens; 1 for a pair).
    """

    collate: Callable[[Sequence[E]], tuple[Tensor, ...]]
    weight: Callable[[E], int]


@dataclass(frozen=True)
class Fit:
    """How the training went: optimiser steps, first and last training loss, and seconds."""

    steps: int
    loss_first: float
    loss_last: float
    seconds: float


def start_process(settings: Supervised, seed: int) -> Accelerator:
    """Join the other ranks (if any), seed everything, and make CPU kernels repeatable bit for bit."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import set_seed
    from transformers.utils import logging as transformers_logging

    # models.py checks what fits and what does not; transformers' tables and bars would only fill the stage's log.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = not torch.cuda.is_available()
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=settings.mixed_precision,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.num_processes != world:
        raise RuntimeError(f"accelerate sees {accelerator.num_processes} processes, the launcher started {world}")
    if on_cpu:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid
    set_seed(seed)
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.WARNING)
    return accelerator


def plan_epoch(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of example indices for one epoch: every example once, similar lengths together, order shuffled.

    A pure function of its arguments. The last batch may be smaller.
    """
    shuffle = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    shuffle.shuffle(order)
    bucket = batch_size * BUCKET_BATCHES
    batches = []
    for start in range(0, len(order), bucket):
        indices = sorted(order[start : start + bucket], key=lambda index: lengths[index])  # stable: ties stay shuffled
        batches += [indices[at : at + batch_size] for at in range(0, len(indices), batch_size)]
    shuffle.shuffle(batches)
    return batches


def split_by_tokens(examples: Sequence[E], max_tokens: int = MICRO_BATCH_TOKENS) -> list[list[E]]:
    """Cut a rank's examples, longest first, into pieces of at most `max_tokens` padded tokens (at least one each)."""
    pieces: list[list[E]] = []
    for example in sorted(examples, key=lambda example: -example.length):
        if pieces and (len(pieces[-1]) + 1) * pieces[-1][0].length <= max_tokens:
            pieces[-1].append(example)
        else:
            pieces.append([example])
    return pieces


def learning_rate(step: int, total: int, settings: Supervised) -> float:
    """The rate of optimiser step `step` (from 0): linear warm-up, then half a cosine down to a tenth of the peak."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / (settings.warmup_steps + 1)
    done = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    return settings.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(module: nn.Module, settings: Supervised) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, not on biases and norms."""
    matrices = [parameter for parameter in module.parameters() if parameter.requires_grad and parameter.ndim >= 2]
    vectors = [parameter for parameter in module.parameters() if parameter.requires_grad and parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=BETAS, fused=True)


def fit(
    accelerator: Accelerator,
    module: nn.Module,
    task: Task[E],
    examples: Sequence[E],
    settings: Supervised,
    seed: int,
    progress: Progress | None = None,
) -> Fit:
    """Train `module`, whose forward returns the SUM of an example batch's losses, in place.

    Per optimiser step the gradient is that of the mean over all ranks' terms, clipped to norm 1.0.
    """
    started = time.monotonic()
    wrapped, optimizer = accelerator.prepare(module, make_optimizer(module, settings))
    wrapped.train()
    lengths = [example.length for example in examples]
    total = settings.epochs * math.ceil(len(examples) / settings.batch_size)
    losses: list[float] = []
    step = 0
    for epoch in range(settings.epochs):
        for indices in plan_epoch(lengths, settings.batch_size, seed, epoch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, settings)
            loss = _backward(accelerator, wrapped, task, [examples[index] for index in indices])
            accelerator.clip_grad_norm_(wrapped.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            # Every step's loss as a number would make a GPU wait: only when it is shown.
            if step % 20 == 0 or step in (1, total):
                losses.append(float(accelerator.reduce(loss, "sum")))
                if not math.isfinite(losses[-1]):
                    raise UserError(f"the training loss is {losses[-1]} at step {step}; lower the stage's lr")
                _log.info("step %d/%d loss %.4f", step, total, losses[-1])
            if progress is not None:
                progress.update(step, f"loss {losses[-1]:.3f}")
    return Fit(step, losses[0], losses[-1], time.monotonic() - started)


def _backward(accelerator: Accelerator, wrapped: nn.Module, task: Task[E], batch: Sequence[E]) -> Tensor:
    """Add a global batch's gradient; return this rank's share of the mean loss (the shares of all ranks sum to it)."""
    world = accelerator.num_processes
    count = sum(task.weight(example) for example in batch)
    mine = list(batch[accelerator.process_index :: world])
    # A rank without a row still takes part in the gradient's all-reduce, with a row that weighs nothing.
    scale = 1.0 / max(1, count) if mine else 0.0
    pieces = split_by_tokens(mine or batch[:1])
    share = torch.zeros((), device=accelerator.device)
    for number, piece in enumerate(pieces, 1):
        # The ranks' gradients are averaged, so that a sum over ranks needs a factor of their number.
        if number < len(pieces):
            with accelerator.no_sync(wrapped):
                loss = wrapped(*_to(task.collate(piece), accelerator.device)) * scale
                accelerator.backward(loss * world)
        else:
            loss = wrapped(*_to(task.collate(piece), accelerator.device)) * scale
            accelerator.backward(loss * world)
        share += loss.detach()
    return share


@torch.no_grad()
def sum_over(
    accelerator: Accelerator,
    measure: Callable[..., Tensor],
    task: Task[E],
    examples: Sequence[E],
) -> list[float]:
    """Sum `measure(*tensors)`, a float64 vector, over all examples of all ranks, without gradients."""
    ordered = sorted(examples, key=lambda example: -example.length)
    total: Tensor | None = None
    for piece in split_by_tokens(ordered[accelerator.process_index :: accelerator.num_processes]):
        part = measure(*_to(task.collate(piece), accelerator.device))
        total = part if total is None else total + part
    if total is None:  # fewer examples than ranks: a measured row gives the vector's size
        total = torch.zeros_like(measure(*_to(task.collate(ordered[:1]), accelerator.device)))
    return [float(value) for value in accelerator.reduce(total, "sum")]


def pad_rows(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Right-pad id lists to an int64 tensor. # (B, T)"""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])


def hidden_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Final hidden states of right-padded rows. # (B, T) -> (B, T, H)

    No attention mask: padding lies behind every real token, where a causal model does not look.
    """
    output: Any = model.base_model(input_ids=ids, use_cache=False)
    return output.last_hidden_state  # type: ignore[no-any-return]


def _to(tensors: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)
