"""One phase of PPO: responses are sampled and scored, advantages estimated, and the epochs trained."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.config.schema import Config
from pipeline.run.directory import RunDir
from pipeline.training.advantages import explained_variance
from pipeline.training.control import KLController, clip_scores, scale_of
from pipeline.training.decode import Response
from pipeline.training.metrics import Row
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

    def run_phase(self, state: TrainState) -> tuple[TrainState, Row] | None:
        """Sample, score, estimate, update: the new state and what to record. None when a stop was asked for before the
        first update."""
        started = time.monotonic()
        self.sampler.scorer.traffic()  # an evaluation's is not this phase's
        config, ppo, ranks = self.config, self.config.ppo, self.ranks
        rows = phase_prompts(state.phase, ranks.rank, ranks.world, ppo.num_rollouts, len(self.data.train), config.seed)
        with self.sampler.whole_weights():
            responses, pending = self.sample(rows, state.phase)
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
            **token_row(exp, ranks),
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
            kl=kl,
            kl_coefficient=controller.updated(kl, ppo.num_rollouts * ranks.world).coefficient,
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
