"""The PPO training loop: phases of sampling and updating, evaluation, checkpoints, and stopping on request."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import Config
from pipeline.run import atomic
from pipeline.run.directory import RunDir
from pipeline.run.work import Progress
from pipeline.training.advantages import explained_variance
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.control import KLController, RunningMoments, clip_scores, moments_from, scale_of
from pipeline.training.decode import Response
from pipeline.training.heldout import heldout_reward
from pipeline.training.metrics import METRICS, Row, append_row, keep_rows_until
from pipeline.training.prompts import generator_for, phase_prompts
from pipeline.training.reward_source import RewardSource, server_figures
from pipeline.training.rollout import PendingScores, Sampler
from pipeline.training.split import Top
from pipeline.training.stop import StopRequest
from pipeline.training.update import (
    Experience,
    Updater,
    experience,
    mean_kl,
    plan_phase,
    reference_function,
    targets_of,
)

if TYPE_CHECKING:
    from pipeline.data.preferences import Preference
    from pipeline.training.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """Everything that a resume needs beside weights and optimiser; the same on every rank."""

    kl_coefficient: float
    step: int = 0
    phase: int = 0
    """Phases done: with the seed, this is the data position and all the randomness to come."""
    moments: RunningMoments = field(default_factory=RunningMoments)
    kl: float = 0.0
    first_reward: float | None = None
    last_reward: float | None = None
    evaluated_step: int = -1
    best_reward: float | None = None
    best_step: int = 0
    rollouts: int = 0
    seconds: float = 0.0
    """Of phases, without evaluations and checkpoints."""

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def state_from(raw: Mapping[str, Any]) -> TrainState:
    """A state as a checkpoint holds it."""
    names = TrainState.__dataclass_fields__
    values = {name: raw[name] for name in names}
    return TrainState(**{**values, "moments": moments_from(raw["moments"])})


def renewed(state: TrainState) -> TrainState:
    """The state from which training goes on under another reward model: scores of two models do not compare."""
    return replace(state, moments=RunningMoments(), first_reward=None, best_reward=None, best_step=state.step)


def steps_per_phase(config: Config) -> int:
    """Optimiser steps of a full phase."""
    return config.ppo.ppo_epochs * config.ppo.num_rollouts // config.train.batch_size


@dataclass
class Data:
    """Prompts with the data set's answers, and those answers' scores where rewards are deltas."""

    train: Sequence[Preference]
    heldout: Sequence[Preference]
    train_baselines: Mapping[int, float] | None
    heldout_baselines: Mapping[int, float] | None


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
        """One phase: sample, score, estimate, update. None when a stop was asked for before the first update."""
        started = time.monotonic()
        self.sampler.scorer.traffic()  # an evaluation's is not this phase's
        config, ppo, ranks = self.config, self.config.ppo, self.ranks
        rows = phase_prompts(state.phase, ranks.rank, ranks.world, ppo.num_rollouts, len(self.data.train), config.seed)
        responses, pending = self._sample(rows, state.phase)
        if ranks.any(bool(self.stop)):
            return None
        sampled = time.monotonic()

        lengths = [len(response.tokens) for response in responses]
        micro = config.train.micro_batch_size or config.train.batch_size
        plans = plan_phase(lengths, ppo, config.train.batch_size, micro, config.seed, ranks.rank, state.phase)
        temperature = config.generate.temperature
        reference = reference_function(self.reference, temperature, self.updater.accelerator.autocast)
        exp = experience(self.updater.policy, reference, responses, plans[0], temperature)
        estimated = time.monotonic()

        scores = [score for chunk in pending for score in chunk.result()]
        scored = time.monotonic()
        if self.data.train_baselines is not None:
            scores = [score - self.data.train_baselines[row] for row, score in zip(rows, scores, strict=True)]
        clipped = clip_scores(scores, ppo.cliprange_reward)
        everyone = [score for part in ranks.gather(clipped) for score in part]
        moments = state.moments.updated(everyone)
        scale = scale_of(ppo.scale_reward, ppo.ref_std, moments)
        controller = KLController(state.kl_coefficient, ppo.target, ppo.horizon)
        targets = targets_of(exp, [score / scale for score in clipped], controller.coefficient, ppo, ranks)
        kl, kl_per_token = mean_kl(exp, ranks)
        step, losses = self.updater.run(exp, targets, plans, state.step, config.train.total_steps)
        ended = time.monotonic()

        row: Row = {
            "step": step,
            "phase": state.phase,
            "rollout_scores/mean": statistics.fmean(everyone),
            "rollout_scores/std": statistics.pstdev(everyone),
            "rollout_scores/running_mean": moments.mean,
            "rollout_scores/running_std": moments.std,
            "policy/sqrt_kl": math.sqrt(max(kl, 0.0)),
            "policy/kl": kl,
            "policy/kl_per_token": kl_per_token,
            "kl_ctl_value": controller.coefficient,
            "values/explained_variance": explained_variance(exp.values, targets.returns, ranks.sum),
            **losses,
            **self._token_row(exp),
            "time/rollout_generate": sampled - started,
            "time/forward": estimated - sampled,
            "time/rollout_score": scored - estimated,
            "time/rollout_time": scored - started,
            "time/train": ended - scored,
            "time/phase": ended - started,
        }
        row["tokens_per_second"] = row["tokens/response"] / row["time/phase"]
        row |= server_figures(self.run, ranks.gather(self.sampler.scorer.traffic()), time.time() - row["time/phase"])
        self._record(row)
        self.progress_note(step, f"reward {row['rollout_scores/mean']:.2f} kl {kl:.2f}")
        return replace(
            state,
            step=step,
            phase=state.phase + 1,
            moments=moments,
            kl=kl,
            kl_coefficient=controller.updated(kl, ppo.num_rollouts * ranks.world).coefficient,
            rollouts=state.rollouts + ppo.num_rollouts * ranks.world,
            seconds=state.seconds + ended - started,
        )

    def _follow_announcement(self, state: TrainState) -> TrainState:
        """Change to another reward model if the run announces one. What came before is saved first."""
        identity = self.rewards.announced(self.sampler.scorer) if state.phase else None
        if identity is None:
            return state
        self.checkpoints.save(self.updater.accelerator, state.step, state.plain())
        self.sampler = replace(self.sampler, scorer=self.rewards.change(state.phase, identity, self.sampler.scorer))
        self.data = self.rescore(self.sampler)
        return renewed(state)

    def _sample(self, rows: Sequence[int], phase: int) -> tuple[list[Response], list[PendingScores]]:
        """Sample the phase's chunks; a stop that is asked for meanwhile cuts it short."""
        responses: list[Response] = []
        pending = []
        size = self.config.ppo.chunk_size
        for chunk, start in enumerate(range(0, len(rows), size)):
            if self.stop:
                break
            prompts = [self.data.train[row].prompt for row in rows[start : start + size]]
            generator = generator_for(self.ranks.device, self.config.seed, "rollout", self.ranks.rank, phase, chunk)
            more, scores = self.sampler.sample(prompts, generator)
            responses += more
            pending.append(scores)
        return responses, pending

    def _token_row(self, exp: Experience) -> Row:
        """Counts and means over all ranks' responses."""
        responses = exp.responses
        sums = exp.logprobs.new_tensor(
            [
                len(responses),
                sum(len(response.prompt) for response in responses),
                sum(len(response.tokens) for response in responses),
                sum(response.finish == "eos" for response in responses),
                sum(response.finish == "stop" for response in responses),
                float(exp.entropy.sum()),
                float(exp.values.sum()),
            ]
        ).double()
        rows, prompt, tokens, eos, stopped, entropy, values = self.ranks.sum(sums).tolist()
        return {
            "tokens/prompt": int(prompt),
            "tokens/response": int(tokens),
            "response_length/mean": tokens / rows,
            "finished/eos": eos / rows,
            "finished/stop": stopped / rows,
            "finished/length": 1.0 - (eos + stopped) / rows,
            "policy/entropy": entropy / tokens,
            "old_values/mean": values / tokens,
        }

    def _evaluate(self, state: TrainState) -> TrainState:
        """Measure the held-out reward; remember the first, the last and the best."""
        started = time.monotonic()
        chunk, seed = self.config.ppo.chunk_size, self.config.seed
        row: Row = {"step": state.step}
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
