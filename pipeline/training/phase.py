"""One phase of PPO: responses are sampled and scored, advantages estimated, and the epochs trained."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pipeline.config.schema import Config
from pipeline.run.directory import RunDir
from pipeline.training.control import KLController, scale_of
from pipeline.training.decode import Response
from pipeline.training.dense import Scores, scores_of, shaped
from pipeline.training.metrics import Row
from pipeline.training.microbatches import limits_of, plan_phase
from pipeline.training.prompts import generator_for, phase_prompts
from pipeline.training.reward_source import server_figures
from pipeline.training.rollout import PendingScores, Sampler
from pipeline.training.split import Top
from pipeline.training.state import Data, TrainState
from pipeline.training.stop import StopRequest
from pipeline.training.update import experience, reference_function, targets_of
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

    def run_phase(self, state: TrainState) -> tuple[TrainState, Row] | None:
        """Sample, score, estimate, update: the new state and what to record. None when a stop was asked for before the
        first update."""
        started = time.monotonic()
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
        responses, pending = self.sample(rows, state.phase)
        if ranks.any(bool(self.stop)):
            return None
        sampled = time.monotonic()

        widths = [len(response.states) for response in responses]
        seed = (config.seed, ranks.rank, state.phase)
        plans = plan_phase(widths, ppo, config.train.batch_size, limits_of(config.train), ranks, *seed)
        temperature = config.generate.temperature
        reference = reference_function(self.reference, temperature, self.updater.accelerator.autocast)
        exp = experience(self.updater.policy, reference, responses, plans[0], temperature)
        estimated = time.monotonic()

        answers = [score for chunk in pending for score in chunk.result()]
        scored = time.monotonic()
        scores = self._shaped(rows, responses, answers)
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
        taken, losses = self.updater.run(exp, targets, plans, state.step, config.train.total_steps)
        step = state.step + len(taken.norms)
        ended = time.monotonic()

        row: Row = {
            "step": step,
            "phase": state.phase,
            "rollout_scores/mean": statistics.fmean(everyone),
            "rollout_scores/std": statistics.pstdev(everyone),
            "rollout_scores/running_mean": moments.mean,
            "rollout_scores/running_std": moments.std,
            "kl_ctl_value": controller.coefficient,
            **targets.figures,
            **losses,
            "time/rollout_generate": sampled - started,
            "time/forward": estimated - sampled,
            "time/rollout_score": scored - estimated,
            "time/rollout_time": scored - started,
            "time/train": ended - scored,
            "time/phase": ended - started,
        }
        row["tokens_per_second"] = row["tokens/response"] / row["time/phase"]
        row |= server_figures(self.run, ranks.gather(self.sampler.scorer.traffic()), time.time() - row["time/phase"])
        after = replace(
            state,
            step=step,
            phase=state.phase + 1,
            moments=moments,
            kl=targets.figures["policy/kl"],
            kl_coefficient=controller.updated(targets.figures["policy/kl"], ppo.num_rollouts * ranks.world).coefficient,
            rollouts=state.rollouts + ppo.num_rollouts * ranks.world,
            seconds=state.seconds + ended - started,
        )
        return after, row

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
            more, scores = self.sampler.sample(prompts, generator, self.config.ppo.dense_reward_every)
            responses += more
            pending.append(scores)
        return responses, pending

    def _shaped(self, rows: Sequence[int], responses: Sequence[Response], answers: Sequence[float]) -> list[Scores]:
        """What the reward model said of each response, less its baseline, clipped, and less the penalty for no end."""
        ppo, known = self.config.ppo, self.data.train_baselines or {}
        baselines = [known[row] if self.data.train_baselines is not None else 0.0 for row in rows]
        penalties = [ppo.missing_eos_penalty if response.finish == "length" else 0.0 for response in responses]
        found = scores_of(responses, answers, ppo.dense_reward_every, self.sampler.scoring)
        return [
            shaped(score, baseline, ppo.cliprange_reward, penalty)
            for score, baseline, penalty in zip(found, baselines, penalties, strict=True)
        ]
