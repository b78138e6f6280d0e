"""One phase of PPO: responses are sampled and scored, advantages estimated, and the epochs trained."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import Config
from pipeline.run.directory import RunDir
from pipeline.training.advantages import explained_variance
from pipeline.training.arithmetic import arithmetic, memory_row, peak_flops
from pipeline.training.control import KLController, clip_scores, scale_of
from pipeline.training.decode import Response
from pipeline.training.dumps import rollout_rows, write_rollouts
from pipeline.training.experience import Minibatch
from pipeline.training.metrics import Row
from pipeline.training.open_phase import OpenPhase, experience_from, phase_from
from pipeline.training.prompts import generator_for, phase_prompts
from pipeline.training.reward_source import server_figures
from pipeline.training.rollout import PendingScores, Sampler
from pipeline.training.split import Top
from pipeline.training.state import Data, TrainState
from pipeline.training.stop import StopRequest
from pipeline.training.update import Experience, experience, mean_kl, plan_phase, reference_function, targets_of
from pipeline.training.updater import Updater

if TYPE_CHECKING:
    from pipeline.training.ranks import Ranks


@dataclass
class Phases:
    """Runs phases from state to state."""

    run: RunDir
    config: Config
    data: Data
    sampler: Sampler
    updater: Updater
    reference: Top
    ranks: Ranks
    stop: StopRequest
    folder: Path
    """Of this training's checkpoints and records."""

    def begin(self, state: TrainState) -> OpenPhase | None:
        """Sample, score and estimate. None when a stop was asked for before all was sampled: that is done again."""
        started, began = time.monotonic(), time.time()
        self.sampler.scorer.traffic()  # an evaluation's is not this phase's
        config, ppo, ranks = self.config, self.config.ppo, self.ranks
        rows = phase_prompts(state.phase, ranks.rank, ranks.world, ppo.num_rollouts, len(self.data.train), config.seed)
        responses, pending = self.sample(rows, state.phase)
        if ranks.any(bool(self.stop)):
            return None
        sampled = time.monotonic()

        plans = self.plans([len(response.tokens) for response in responses], state.phase)
        temperature = config.generate.temperature
        reference = reference_function(self.reference, temperature, self.updater.accelerator.autocast)
        exp = experience(self.updater.policy, reference, responses, plans[0], temperature)
        estimated = time.monotonic()

        raw_scores = scores = [score for chunk in pending for score in chunk.result()]
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
        if config.train.log_rollouts:
            dumped = ranks.gather(rollout_rows(exp, self.sampler, rows, raw_scores, clipped))
            if ranks.first:
                write_rollouts(self.folder, state.phase, state.step, dumped)
        waited = max(ranks.gather(scored - estimated))

        row: Row = {
            "phase": state.phase,
            "reward_model": self.sampler.scorer.identity,
            "rollout_scores/mean": statistics.fmean(everyone),
            "rollout_scores/std": statistics.pstdev(everyone),
            "rollout_scores/running_mean": moments.mean,
            "rollout_scores/running_std": moments.std,
            "policy/sqrt_kl": math.sqrt(max(kl, 0.0)),
            "policy/kl": kl,
            "policy/kl_per_token": kl_per_token,
            "kl_ctl_value": controller.coefficient,
            "values/explained_variance": explained_variance(exp.values, targets.returns, ranks.sum),
            **token_row(exp, ranks),
            "time/rollout_generate": sampled - started,
            "time/forward": estimated - sampled,
            "time/rollout_score": scored - estimated,
            "time/reward_wait": waited,
            "time/rollout_time": scored - started,
        }
        after = replace(
            state,
            phase=state.phase + 1,
            moments=moments,
            kl=kl,
            kl_coefficient=controller.updated(kl, ppo.num_rollouts * ranks.world).coefficient,
            rollouts=state.rollouts + ppo.num_rollouts * ranks.world,
        )
        traffic = ranks.gather(self.sampler.scorer.traffic())
        ended = time.monotonic()
        return OpenPhase(
            state.step, exp, targets, plans, after, row, traffic, began, ended - started, train_seconds=ended - scored
        )

    def reopen(self, raw: Mapping[str, Any]) -> OpenPhase:
        """A phase as a checkpoint in the middle of it holds it."""
        exp, targets = experience_from(raw, self.ranks.device)
        return phase_from(raw, exp, targets, self.plans(exp.packing.lengths, raw["row"]["phase"]))

    def advance(self, phase: OpenPhase, pause: Callable[[int], bool]) -> None:
        """Train the phase's epochs, to their end or to where `pause` says."""
        started = time.monotonic()
        total = self.config.train.total_steps
        phase.taken, phase.losses = self.updater.run(
            phase.exp, phase.targets, phase.plans, phase.first, total, phase.taken, pause
        )
        seconds = time.monotonic() - started
        phase.seconds += seconds
        phase.train_seconds += seconds

    def finish(self, phase: OpenPhase) -> tuple[TrainState, Row]:
        """What follows a complete phase, and what to record of it."""
        row: Row = {"step": phase.step, **phase.row, **phase.losses}
        row["time/train"], row["time/phase"] = phase.train_seconds, phase.seconds
        row["time/reward_wait_share"] = row["time/reward_wait"] / phase.seconds
        row["tokens_per_second"] = row["tokens/response"] / phase.seconds
        row["samples_per_second"] = self.config.ppo.num_rollouts * self.ranks.world / phase.seconds
        row |= self.arithmetic_row(phase, row)
        row |= memory_row(self.ranks)
        row |= server_figures(self.run, phase.traffic, phase.began)
        return replace(phase.after, step=phase.step, seconds=phase.after.seconds + phase.seconds), row

    def plans(self, lengths: Sequence[int], phase: int) -> list[list[Minibatch]]:
        """The phase's minibatches, epoch by epoch."""
        train = self.config.train
        micro = train.micro_batch_size or train.batch_size
        return plan_phase(lengths, self.config.ppo, train.batch_size, micro, self.config.seed, self.ranks.rank, phase)

    def arithmetic_row(self, phase: OpenPhase, row: Row) -> Row:
        """FLOP/s of all devices together, and their share of the devices' peak where that is known."""
        split, world = self.sampler.split, self.ranks.world
        counts = arithmetic(
            split.trunk, split.top.part, split.top.head, self.updater.accelerator.unwrap_model(self.updater.policy)
        )
        steps = sum(len(plan) for plan in phase.plans)
        epochs = self.config.ppo.ppo_epochs * (phase.step - phase.first) / steps
        response = row["tokens/response"]
        tokens = row["tokens/prompt"] + response
        whole = counts.phase(tokens, response, epochs) / phase.seconds
        update = counts.update(tokens, response, epochs) / phase.train_seconds
        figures: Row = {"tflops": whole / 1e12, "tflops/train": update / 1e12}
        peak = peak_flops(self.ranks.device, self.config.train.peak_tflops)
        if peak is not None:
            figures |= {"mfu": whole / (peak * world), "mfu/train": update / (peak * world)}
        return figures

    def sample(self, rows: Sequence[int], phase: int) -> tuple[list[Response], list[PendingScores]]:
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


def token_row(exp: Experience, ranks: Ranks) -> Row:
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
    rows, prompt, tokens, eos, stopped, entropy, values = ranks.sum(sums).tolist()
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
