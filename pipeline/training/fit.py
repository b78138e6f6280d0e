"""The loop of supervised training (SFT, reward models, ILQL): steps, metrics, evaluations, checkpoints, stops.

Batches are a pure function of seed and epoch, so that the number of steps done is the whole position: a training that
was stopped or killed goes on in the middle of an epoch, and on a CPU ends in the same bits.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.run.work import Progress
from pipeline.training.batches import E, epoch_steps, plan_epoch
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.distributed import was_skipped
from pipeline.training.metrics import METRICS, Row, append_row, keep_rows_until
from pipeline.training.ranks import Ranks
from pipeline.training.stop import StopRequest
from pipeline.training.task import Task, backward

if TYPE_CHECKING:
    from accelerate import Accelerator

SKIPPED = "update/skipped"
"""The steps since the last metrics row that fp16 left out."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Course:
    """How long is trained, in which batches, at which rate."""

    total_steps: int
    batch_size: int
    """Examples per optimiser step, of all ranks together."""
    seed: int
    rate: Callable[[int], float]
    """The learning rate of an optimiser step, counted from 0."""
    shuffled: bool = True
    micro_batch_tokens: int = 8192
    max_grad_norm: float = 1.0
    log_interval: int = 10
    """Steps between metrics rows, which are means over the steps since the last one."""
    eval_interval: int | None = None
    """Steps between evaluations, which then begin at step 0; None evaluates at the end only."""
    checkpoint_interval: int = 1000


@dataclass
class Keeping:
    """Where a training leaves its traces, and who may stop it."""

    checkpoints: Checkpoints
    stop: StopRequest
    progress: Progress

    @property
    def metrics(self) -> Path:
        """This training's rows, beside its checkpoints."""
        return self.checkpoints.folder / METRICS


@dataclass
class Hooks:
    """What a method adds to the loop. Every rank calls them at the same steps."""

    after_step: Callable[[int], None] = lambda step: None
    """After optimiser step `step`, counted from 1, and before anything is logged, evaluated or saved; not after one
    that fp16 left out."""
    evaluate: Callable[[int], dict[str, float]] | None = None
    """Figures of the model after `step` steps, the same on every rank; they become a metrics row."""
    extra: dict[str, Any] = field(default_factory=dict)
    """The method's own state, JSON values: checkpoints keep it, and a resume puts it back into this very dict."""


@dataclass
class Fit:
    """How far a training has got. A checkpoint keeps all of it."""

    step: int = 0
    first: dict[str, float] = field(default_factory=dict)
    """The means of the first metrics row (of step 1 alone)."""
    last: dict[str, float] = field(default_factory=dict)
    evaluated: dict[str, float] = field(default_factory=dict)
    """The last evaluation."""
    evaluated_step: int = -1
    window: list[list[float]] = field(default_factory=list)
    """Means, by step, that no row shows yet."""
    tokens: float = 0.0
    """Real tokens that were trained on, over all steps and ranks."""
    padded: float = 0.0
    """The same with padding."""
    seconds: float = 0.0
    """Of training steps, without evaluations and checkpoints."""
    complete: bool = False

    def figures(self) -> dict[str, float]:
        """Loss, time and throughput, as stages record them."""
        return {
            "train_loss_first": self.first.get("losses/loss", math.nan),
            "train_loss_last": self.last.get("losses/loss", math.nan),
            "steps": self.step,
            "tokens": int(self.tokens),
            "tokens_per_second": round(self.tokens / max(self.seconds, 1e-9), 1),
            "padding": round(1.0 - self.tokens / max(self.padded, 1.0), 4),
            "train_seconds": round(self.seconds, 3),
        }


@dataclass
class Loop(Generic[E]):
    """Trains `wrapped`, with its optimiser as accelerate prepared them, in place, from its newest checkpoint if any."""

    accelerator: Accelerator
    ranks: Ranks
    wrapped: nn.Module
    optimizer: Any
    task: Task[E]
    examples: Sequence[E]
    course: Course
    keeping: Keeping
    hooks: Hooks = field(default_factory=Hooks)
    state: Fit = field(default_factory=Fit, init=False)
    _fresh: list[Tensor] = field(default_factory=list, init=False)
    """This rank's vectors of the steps that are not summed over ranks yet."""
    _epoch: tuple[int, list[list[int]]] | None = field(default=None, init=False)
    _clock: float = field(default=0.0, init=False)
    _row_clock: float = field(default=0.0, init=False)
    _saved: int = field(default=-1, init=False)

    def run(self) -> Fit:
        """Per optimiser step the gradient is that of the mean over all ranks' terms, clipped. Returns early, saved and
        not complete, when asked to stop. UserError when a loss is not finite."""
        self._clock = self._row_clock = time.monotonic()
        with self.keeping.checkpoints.finishing():
            return self._run()

    def _run(self) -> Fit:
        course, state = self.course, self._resume()
        self.wrapped.train()
        if state.step == 0 and course.eval_interval is not None:
            self._evaluate()
        self._clock = self._row_clock = time.monotonic()
        while state.step < course.total_steps:
            if self._step(self._batch(state.step)):
                self.hooks.after_step(state.step)
            last = state.step == course.total_steps
            if last or state.step == 1 or state.step % course.log_interval == 0:
                self._log()
            if last or (course.eval_interval and state.step % course.eval_interval == 0):
                self._evaluate()
            stopping = self._asked_to_stop()
            if last or stopping or state.step % course.checkpoint_interval == 0:
                self._save()
            if stopping and not last:
                break
        self.keeping.checkpoints.wait()
        state.complete = state.step == course.total_steps
        return state

    def _resume(self) -> Fit:
        saved = self.keeping.checkpoints.load(self.accelerator)
        if saved is not None:
            names = Fit.__dataclass_fields__
            self.state = Fit(**{name: saved[name] for name in names if name != "complete"})
            self.hooks.extra.clear()
            self.hooks.extra.update(saved["extra"])
        if self.ranks.first:
            keep_rows_until(self.keeping.metrics, self.state.step if saved is not None else -1)
        return self.state

    def _batch(self, step: int) -> list[E]:
        course = self.course
        epoch, place = divmod(step, epoch_steps(len(self.examples), course.batch_size))
        if self._epoch is None or self._epoch[0] != epoch:
            lengths = [example.length for example in self.examples]
            self._epoch = epoch, plan_epoch(lengths, course.batch_size, course.seed, epoch, course.shuffled)
        return [self.examples[index] for index in self._epoch[1][place]]

    def _step(self, batch: Sequence[E]) -> bool:
        """A step of the optimiser; whether it was taken, and not left out for gradients that overflow fp16."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.course.rate(self.state.step)
        sums = backward(self.accelerator, self.wrapped, self.task, batch, self.course.micro_batch_tokens)
        norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.course.max_grad_norm)
        self.optimizer.step()
        skipped = was_skipped(self.accelerator, self.optimizer)
        self.optimizer.zero_grad()
        self.state.step += 1
        # The norm is the same on every rank, so one of them says it. Nothing here waits for a GPU.
        means = sums.means
        mine = norm if self.ranks.first and norm is not None and not skipped else 0.0
        numbers = (mine, float(skipped and self.ranks.first), sums.tokens, sums.padded)
        tail = [torch.as_tensor(value, dtype=means.dtype, device=means.device) for value in numbers]
        self._fresh.append(torch.cat([means[: len(self.task.statistics)], torch.stack(tail)]))
        return not skipped

    def _gather(self) -> None:
        """Sum the steps' vectors over ranks; UserError where a loss is not finite."""
        if not self._fresh:
            return
        rows = self.ranks.sum(torch.stack(self._fresh)).tolist()
        self._fresh = []
        self.state.window += rows
        first = self.state.step - len(rows) + 1
        for step, row in enumerate(rows, first):
            if not math.isfinite(row[0]):
                raise UserError(f"the training loss is {row[0]} at step {step}; lower the learning rate")
            self.state.tokens += row[-2]
            self.state.padded += row[-1]
        now = time.monotonic()
        self.state.seconds += now - self._clock
        self._clock = now

    def _log(self) -> None:
        self._gather()
        state, names = self.state, (*self.task.statistics, "grad_norm", SKIPPED, "tokens/real", "tokens/padded")
        columns = zip(*state.window, strict=True)
        means = {name: math.fsum(column) / len(state.window) for name, column in zip(names, columns, strict=True)}
        means[SKIPPED] = skipped = round(means[SKIPPED] * len(state.window))
        if skipped:  # which have no norm
            means["grad_norm"] *= len(state.window) / max(1, len(state.window) - skipped)
        state.last = means
        state.first = state.first or means
        steps, state.window = len(state.window), []
        now = time.monotonic()
        seconds = max(1e-9, now - self._row_clock)
        real, padded = means.pop("tokens/real"), means.pop("tokens/padded")
        self._record(
            {
                **means,
                "learning_rate_group_0": self.course.rate(state.step - 1),
                "epoch": state.step / epoch_steps(len(self.examples), self.course.batch_size),
                "tokens": int(state.tokens),
                "tokens_per_second": real * steps / seconds,
                "padding": 1.0 - real / padded,
                "time/step": seconds / steps,
            }
        )
        self._row_clock = now
        note = f"loss {means['losses/loss']:.3f}" if "losses/loss" in means else ""
        if self.ranks.first:
            _log.info("step %d/%d %s", state.step, self.course.total_steps, note)
            self.keeping.progress.update(state.step, note)

    def _evaluate(self) -> None:
        if self.hooks.evaluate is None:
            return
        self._gather()
        started = time.monotonic()
        self.state.evaluated = self.hooks.evaluate(self.state.step)
        self.state.evaluated_step = self.state.step
        self.wrapped.train()
        self._record({**self.state.evaluated, "time/evaluate": time.monotonic() - started})
        self._pause(started)

    def _save(self) -> None:
        if self._saved == self.state.step:
            return
        self._gather()
        started = time.monotonic()
        state = {name: value for name, value in vars(self.state).items() if name != "complete"}
        kept = copy.deepcopy({**state, "extra": self.hooks.extra})  # written while the loop goes on
        self.keeping.checkpoints.save(self.accelerator, self.state.step, kept)
        self._saved = self.state.step
        self._pause(started)

    def _pause(self, started: float) -> None:
        """What has happened since `started` was no training."""
        away = time.monotonic() - started
        self._clock += away
        self._row_clock += away

    def _record(self, numbers: Row) -> None:
        if self.ranks.first:
            append_row(self.keeping.metrics, {"step": self.state.step, **numbers})
        self.accelerator.log(numbers, step=self.state.step)

    def _asked_to_stop(self) -> bool:
        """Also where writing in the background has failed on some rank: the save that follows says why."""
        asked = bool(self.keeping.stop) or self.keeping.checkpoints.failed
        return self.ranks.any(asked) if self.ranks.world > 1 else asked  # alone, nothing waits for a GPU
