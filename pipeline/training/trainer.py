"""The PPO training loop: phases of sampling and updating, evaluation, checkpoints, and stopping on request."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import Config
from pipeline.run import atomic
from pipeline.run.directory import RunDir
from pipeline.run.work import Progress
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.dumps import SAMPLES, SHOWN, drop_rollouts_from, write_samples
from pipeline.training.heldout import heldout_answers, reward_row
from pipeline.training.metrics import METRICS, Row, append_row, keep_rows_until
from pipeline.training.open_phase import OpenPhase, plain
from pipeline.training.phase import Phases
from pipeline.training.reward_source import RewardSource
from pipeline.training.rollout import Sampler
from pipeline.training.split import Top
from pipeline.training.state import Data, TrainState, renewed, state_from
from pipeline.training.stop import StopRequest
from pipeline.training.tracking import go_on_from, log_samples
from pipeline.training.updater import Updater

if TYPE_CHECKING:
    from pipeline.training.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass
class Trainer:
    """Runs PPO from a state to its end, or to a requested stop."""

    run: RunDir
    config: Config
    data: Data
    sampler: Sampler
    updater: Updater
    reference: Top
    ranks: Ranks
    checkpoints: Checkpoints
    progress: Progress
    stop: StopRequest
    rewards: RewardSource
    rescore: Callable[[Sampler], Data]
    """The data again, with baselines by the sampler's scorer."""
    _saved: int = field(default=-1, init=False)
    """The step of the last checkpoint."""
    _saving_seconds: float = field(default=0.0, init=False)
    """That training has waited for saving since the last phase's end."""

    @property
    def metrics(self) -> Path:
        """This training's rows, beside its checkpoints."""
        return self.checkpoints.folder / METRICS

    def train(self) -> tuple[TrainState, bool]:
        """Resume where a checkpoint is, train, and return the last saved state and whether training is complete.

        A phase may be open: then the state is that of before it, but for its step count, and a checkpoint holds both.
        """
        state, phase = self._resume()
        while True:
            if phase is None and self._evaluation_due(state) and not self._stopping():
                state = self._evaluate(state) or state
            done = state.step >= self.config.train.total_steps and state.evaluated_step == state.step
            stopping = not done and self._stopping()
            if done or stopping or self._checkpoint_due(state.step):
                self._save(state, phase)
            if self.ranks.any(self.checkpoints.failed):
                self.checkpoints.wait()  # says why
            if done or stopping:
                self.checkpoints.wait()
                return state, done
            if phase is None:
                state = self._follow_announcement(state)
                phase = self._phases().begin(state)
            if phase is not None:
                self._phases().advance(phase, self._pause)
                state = replace(state, step=phase.step)
                if phase.complete:
                    state, phase = self._finish(phase), None

    def _resume(self) -> tuple[TrainState, OpenPhase | None]:
        """The newest checkpoint's state, or the first one; what was recorded beyond it is dropped."""
        raw = self.checkpoints.load(self.updater.accelerator)
        state = state_from(raw) if raw else TrainState(kl_coefficient=self.config.ppo.init_kl_coef)
        kept = self.checkpoints.extra()
        phase = self._phases().reopen(kept) if kept else None
        coming = state.phase + (phase is not None)
        if self.ranks.first:
            folder, last = self.checkpoints.folder, state.step if raw else -1
            keep_rows_until(self.metrics, last)
            keep_rows_until(folder / SAMPLES, last)
            drop_rollouts_from(folder, coming)
            atomic.replace_symlink(self.run.metrics, self.metrics)
        go_on_from(self.updater.accelerator, state.step + 1 if raw else 0)
        self._saved = state.step if raw else -1
        if self.rewards.begin(coming, self.sampler.scorer):
            if phase is None:
                state = renewed(state)
            else:
                phase.after = renewed(phase.after)
        return state, phase

    def _phases(self) -> Phases:
        folder = self.checkpoints.folder
        return Phases(
            self.run, self.config, self.data, self.sampler, self.updater, self.reference, self.ranks, self.stop, folder
        )

    def _finish(self, phase: OpenPhase) -> TrainState:
        """Record a complete phase, and close it."""
        state, row = self._phases().finish(phase)
        row["time/checkpoint"], self._saving_seconds = self._saving_seconds, 0.0
        self._record(row)
        self.progress_note(state.step, f"reward {row['rollout_scores/mean']:.2f} kl {state.kl:.2f}")
        return state

    def _stopping(self) -> bool:
        """Whether a stop was asked for; every rank gets the same answer."""
        return self.ranks.any(bool(self.stop))

    def _pause(self, step: int) -> bool:
        """Whether to interrupt the epochs: to stop, to save, or because saving has failed on some rank."""
        return self._checkpoint_due(step) or self.ranks.any(bool(self.stop) or self.checkpoints.failed)

    def _checkpoint_due(self, step: int) -> bool:
        """Whether a multiple of the interval lies between the last checkpoint and `step`."""
        interval = self.config.train.checkpoint_interval
        return step // interval > max(self._saved, 0) // interval

    def _evaluation_due(self, state: TrainState) -> bool:
        """At the beginning, whenever a multiple of the interval has passed, and at the end."""
        if state.evaluated_step < 0:
            return True
        if state.evaluated_step == state.step:
            return False
        interval = self.config.train.eval_interval
        return state.step >= self.config.train.total_steps or state.step // interval > state.evaluated_step // interval

    def _save(self, state: TrainState, phase: OpenPhase | None = None) -> None:
        """Save state and open phase; what follows goes on as soon as they are copied."""
        if state.step == self._saved:
            return
        started = time.monotonic()
        self.checkpoints.save(
            self.updater.accelerator, state.step, state.plain(), extra=plain(phase) if phase is not None else None
        )
        self._saved = state.step
        self._saving_seconds += time.monotonic() - started

    def _follow_announcement(self, state: TrainState) -> TrainState:
        """Change to another reward model if the run announces one. What came before is saved first."""
        identity = self.rewards.announced(self.sampler.scorer) if state.phase else None
        if identity is None:
            return state
        self._save(state)
        self.checkpoints.wait()
        self.sampler = replace(self.sampler, scorer=self.rewards.change(state.phase, identity, self.sampler.scorer))
        self.data = self.rescore(self.sampler)
        return renewed(state)

    def _evaluate(self, state: TrainState) -> TrainState | None:
        """Measure the held-out reward; remember the first, the last and the best. None when a stop was asked for."""
        started = time.monotonic()
        chunk, seed = self.config.ppo.chunk_size, self.config.seed
        prompts, baselines = self.data.heldout, self.data.heldout_baselines
        with self.sampler.whole_weights():
            answers = heldout_answers(
                self.sampler, prompts, baselines, chunk, seed, self.ranks, lambda: bool(self.stop)
            )
        if answers is None:
            return None
        row: Row = {"step": state.step, **reward_row(answers), "time/evaluate": time.monotonic() - started}
        self._record(row)
        reward = row["reward/mean"]
        if self.ranks.first:
            logger.info("step %d: held-out reward %.4f", state.step, reward)
            write_samples(self.checkpoints.folder, state.step, answers[:SHOWN])
            log_samples(self.updater.accelerator, answers[:SHOWN], state.step)
        best = state.best_reward is None or reward > state.best_reward
        if best and self.config.train.save_best:
            self.checkpoints.save_best(self.updater.accelerator, state.step, reward)
        return replace(
            state,
            first_reward=reward if state.first_reward is None else state.first_reward,
            last_reward=reward,
            evaluated_step=state.step,
            best_reward=reward if best else state.best_reward,
            best_step=state.step if best else state.best_step,
        )

    def _record(self, row: Row) -> None:
        row.setdefault("reward_model", self.sampler.scorer.identity)
        if self.ranks.first:
            append_row(self.metrics, row)
        numbers = {key: value for key, value in row.items() if key != "step"}
        self.updater.accelerator.log(numbers, step=row["step"])

    def progress_note(self, step: int, note: str) -> None:
        """Show how far we are."""
        if self.ranks.first:
            self.progress.update(step, note)
            logger.info("step %d/%d: %s", step, self.config.train.total_steps, note)
