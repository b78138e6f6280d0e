"""One phase of PPO: responses are sampled and scored, advantages estimated, and the epochs trained."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config.schema import Config
from pipeline.run.directory import RunDir
from pipeline.training.arithmetic import arithmetic, memory_row, peak_flops
from pipeline.training.control import KLController, scale_of
from pipeline.training.decode import Response
from pipeline.training.dense import Scores, scores_of, shaped
from pipeline.training.dumps import rollout_rows, write_rollouts
from pipeline.training.metrics import Row
from pipeline.training.microbatches import Minibatch, limits_of, plan_phase
from pipeline.training.open_phase import OpenPhase, experience_from, phase_from
from pipeline.training.prompts import generator_for, phase_prompts
from pipeline.training.reward_source import server_figures
from pipeline.training.rollout import Sampler
from pipeline.training.split import Top
from pipeline.training.state import Data, TrainState
from pipeline.training.stop import StopRequest
from pipeline.training.update import Experience, experience, reference_function, targets_of
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
        rows = phase_prompts(
            state.phase,
            ranks.rank,
            ranks.world,
            ppo.num_rollouts,
            len(self.data.train),
            config.seed,
            ppo.group_size,
        )
        prompts = [self.data.train[row].prompt for row in rows]
        generator = generator_for(ranks.device, config.seed, "rollout", ranks.rank, state.phase)
        with self.sampler.whole_weights():
            responses, pending = self.sampler.sample(
                prompts, generator, ppo.chunk_size, lambda: bool(self.stop), ppo.dense_reward_every
            )
        if ranks.any(len(responses) < len(prompts)):
            return None
        sampled = time.monotonic()

        plans = self.plans([len(response.states) for response in responses], state.phase)
        temperature = config.generate.temperature
        reference = reference_function(self.reference, temperature, self.updater.accelerator.autocast)
        exp = experience(self.updater.policy, reference, responses, plans[0], temperature)
        estimated = time.monotonic()

        answers = pending.result()
        scored = time.monotonic()
        found = scores_of(responses, answers, ppo.dense_reward_every, self.sampler.scoring)
        scores = self._shaped(rows, responses, found)
        ours = torch.tensor([score.whole for score in scores], dtype=torch.float64, device=ranks.device)
        everyone = ranks.gather_rows(ours).flatten().tolist()
        moments = state.moments.updated(everyone)
        scale = scale_of(ppo.scale_reward, ppo.ref_std, moments)
        controller = KLController(state.kl_coefficient, ppo.target, ppo.horizon)
        targets = targets_of(
            exp,
            [score.whole / scale for score in scores],
            controller.coefficient,
            ppo,
            ranks,
            [[(length, each / scale) for length, each in score.beginnings] for score in scores],
        )
        kl = targets.figures["policy/kl"]
        raw, used = [each.whole for each in found], [each.whole for each in scores]
        dump = rollout_rows(exp, self.sampler, rows, raw, used) if config.train.log_rollouts else []
        dumps, waits, traffic = map(
            list, zip(*ranks.gather((dump, scored - estimated, self.sampler.scorer.traffic())), strict=True)
        )
        if config.train.log_rollouts and ranks.first:
            write_rollouts(self.folder, state.phase, state.step, dumps)

        row: Row = {
            "phase": state.phase,
            "reward_model": self.sampler.scorer.identity,
            "rollout_scores/mean": statistics.fmean(everyone),
            "rollout_scores/std": statistics.pstdev(everyone),
            "rollout_scores/running_mean": moments.mean,
            "rollout_scores/running_std": moments.std,
            "kl_ctl_value": controller.coefficient,
            **targets.figures,
            **logprob_gap(exp, ranks),
            "time/rollout_generate": sampled - started,
            "time/forward": estimated - sampled,
            "time/rollout_score": scored - estimated,
            "time/reward_wait": max(waits),
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
        ended = time.monotonic()
        return OpenPhase(
            state.step, exp, targets, plans, after, row, traffic, began, ended - started, train_seconds=ended - scored
        )

    def reopen(self, raw: Mapping[str, Any]) -> OpenPhase:
        """A phase as a checkpoint in the middle of it holds it."""
        exp, targets = experience_from(raw, self.ranks.device)
        return phase_from(
            raw, exp, targets, self.plans([len(each.states) for each in exp.responses], raw["row"]["phase"])
        )

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

    def plans(self, widths: Sequence[int], phase: int) -> list[list[Minibatch]]:
        """The phase's minibatches, epoch by epoch; `widths` are the rows' lengths in a forward."""
        train, seed = self.config.train, (self.config.seed, self.ranks.rank, phase)
        return plan_phase(widths, self.config.ppo, train.batch_size, limits_of(train), self.ranks, *seed)

    def arithmetic_row(self, phase: OpenPhase, row: Row) -> Row:
        """FLOP/s of all devices together, and their share of the devices' peak where that is known."""
        split, world = self.sampler.split, self.ranks.world
        counts = arithmetic(split.trunk, self.updater.accelerator.unwrap_model(self.updater.policy))
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

    def _shaped(self, rows: Sequence[int], responses: Sequence[Response], found: Sequence[Scores]) -> list[Scores]:
        """What the reward model said of each response, less its baseline, clipped, and less the penalty for no end."""
        ppo, known = self.config.ppo, self.data.train_baselines or {}
        baselines = [known[row] if self.data.train_baselines is not None else 0.0 for row in rows]
        penalties = [ppo.missing_eos_penalty if response.finish == "length" else 0.0 for response in responses]
        return [
            shaped(score, baseline, ppo.cliprange_reward, penalty)
            for score, baseline, penalty in zip(found, baselines, penalties, strict=True)
        ]


def logprob_gap(exp: Experience, ranks: Ranks) -> Row:
    """How far the log-probabilities that the decode loop saw are from those of the module that is trained: mean and
    largest difference, in nats per token, over all ranks. More than rounding means that they are not one model."""
    gap = (torch.cat([response.logprobs for response in exp.responses]) - exp.logprobs).abs().double()
    sums, counts, largest = zip(*ranks.gather((float(gap.sum()), len(gap), float(gap.max()))), strict=True)
    return {"rollout/logprob_gap_mean": sum(sums) / sum(counts), "rollout/logprob_gap_max": max(largest)}
