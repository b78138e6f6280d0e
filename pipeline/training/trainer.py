"""The PPO training loop: phases of sampling and updating, evaluation, checkpoints, and stopping on request."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import Config
from pipeline.run import atomic
from pipeline.run.directory import RunDir
from pipeline.run.work import Progress
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.heldout import heldout_reward
from pipeline.training.metrics import METRICS, Row, append_row, keep_rows_until
from pipeline.training.phase import Phases
from pipeline.training.reward_source import RewardSource
from pipeline.training.rollout import Sampler
from pipeline.training.split import Top
from pipeline.training.state import Data, TrainState, renewed, state_from
from pipeline.training.stop import StopRequest
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

    @property
    def metrics(self) -> Path:
        """This training's rows, beside its checkpoints."""
        return self.checkpoints.folder / METRICS

    def train(self) -> tuple[TrainState, bool]:
        """Resume where a checkpoint is, train, and return the last saved state and whether training is complete."""
        total, train = self.config.train.total_steps, self.config.train
        raw = self.checkpoints.load(self.updater.accelerator)
        state = state_from(raw) if raw else TrainState(kl_coefficient=self.config.ppo.init_kl_coef)
        if self.ranks.first:
            keep_rows_until(self.metrics, state.step if raw else -1)
            atomic.replace_symlink(self.run.metrics, self.metrics)
        saved = state.step if raw else -1
        if self.rewards.begin(state.phase, self.sampler.scorer):
            state = renewed(state)
        if raw is None:
            state = self._evaluate(state)
        while state.step < total:
            before = state = self._follow_announcement(state)
            state = self._phase(state) or before
            stopping = state is before or self.ranks.any(bool(self.stop))
            last = state.step >= total
            if state is not before and (last or _crosses(before.step, state.step, train.eval_interval)):
                state = self._evaluate(state)
            if last or stopping or _crosses(saved, state.step, train.checkpoint_interval):
                self.checkpoints.save(self.updater.accelerator, state.step, state.plain())
                saved = state.step
            if stopping and not last:
                return state, False
        return state, True

    def _phase(self, state: TrainState) -> TrainState | None:
        """One phase; None when a stop was asked for before its first update."""
        phases = Phases(
            self.run, self.config, self.data, self.sampler, self.updater, self.reference, self.ranks, self.stop
        )
        done = phases.run_phase(state)
        if done is None:
            return None
        after, row = done
        self._record(row)
        self.progress_note(after.step, f"reward {row['rollout_scores/mean']:.2f} kl {after.kl:.2f}")
        return after

    def _follow_announcement(self, state: TrainState) -> TrainState:
        """Change to another reward model if the run announces one. What came before is saved first."""
        identity = self.rewards.announced(self.sampler.scorer) if state.phase else None
        if identity is None:
            return state
        self.checkpoints.save(self.updater.accelerator, state.step, state.plain())
        self.sampler = replace(self.sampler, scorer=self.rewards.change(state.phase, identity, self.sampler.scorer))
        self.data = self.rescore(self.sampler)
        return renewed(state)

    def _evaluate(self, state: TrainState) -> TrainState:
        """Measure the held-out reward; remember the first, the last and the best."""
        started = time.monotonic()
        chunk, seed = self.config.ppo.chunk_size, self.config.seed
        row: Row = {"step": state.step}
        with self.sampler.whole_weights():
            row |= heldout_reward(self.sampler, self.data.heldout, self.data.heldout_baselines, chunk, seed, self.ranks)
        row["time/evaluate"] = time.monotonic() - started
        self._record(row)
        reward = row["reward/mean"]
        if self.ranks.first:
            logger.info("step %d: held-out reward %.4f", state.step, reward)
        best = state.best_reward is None or reward > state.best_reward
        return replace(
            state,
            first_reward=reward if state.first_reward is None else state.first_reward,
            last_reward=reward,
            evaluated_step=state.step,
            best_reward=reward if best else state.best_reward,
            best_step=state.step if best else state.best_step,
        )

    def _record(self, row: Row) -> None:
        row["reward_model"] = self.sampler.scorer.identity
        if self.ranks.first:
            append_row(self.metrics, row)
        numbers = {key: value for key, value in row.items() if key != "step"}
        self.updater.accelerator.log(numbers, step=row["step"])

    def progress_note(self, step: int, note: str) -> None:
        """Show how far we are."""
        if self.ranks.first:
            self.progress.update(step, note)
            logger.info("step %d/%d: %s", step, self.config.train.total_steps, note)


def _crosses(before: int, after: int, interval: int) -> bool:
    """Whether a multiple of `interval` lies in (before, after]."""
    return after // interval > max(before, 0) // interval
