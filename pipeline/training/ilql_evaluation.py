"""ILQL while it trains: the held-out reward of each beta, what the heads say of held-out answers, the best so far."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from pipeline.config.schema import Config
from pipeline.training.batches import split_by_tokens
from pipeline.training.distributed import compute_dtype, shards_weights, whole_weights
from pipeline.training.heldout import heldout_answers, reward_row
from pipeline.training.ilql_data import Trajectory
from pipeline.training.ilql_decoding import Steering, beta_suffix
from pipeline.training.ilql_model import ILQLModule, merge_statistics, metrics_of
from pipeline.training.ilql_output import decoding_beta
from pipeline.training.ranks import Ranks
from pipeline.training.reward_source import RewardSource
from pipeline.training.rollout import Sampler
from pipeline.training.split import copied
from pipeline.training.task import Task, to_device

if TYPE_CHECKING:
    from pipeline.data.preferences import Preference

logger = logging.getLogger(__name__)


@dataclass
class Evaluation:
    """Figures of the module as it is; to be asked by every rank."""

    config: Config
    accelerator: Accelerator
    ranks: Ranks
    module: ILQLModule
    sampler: Sampler
    rewards: RewardSource
    preferences: Sequence[Preference]
    trajectories: Sequence[Trajectory]
    """The held-out answers of the data set, chosen and rejected in turn."""
    task: Task[Trajectory]
    micro_batch_tokens: int
    rescore: Callable[[Sampler], Mapping[int, float] | None]
    """The baselines of the held-out prompts, by the sampler's scorer."""
    keep_best: Callable[[int], None]
    """Keep the policy as it is now, after so many steps."""
    best: dict[str, Any] = field(default_factory=dict)
    """What a resume must know: first, last and best reward at the beta that decides, and the best's step."""
    _baselines: Mapping[int, float] | None = None
    _begun: bool = False

    def evaluate(self, step: int) -> dict[str, float]:
        """One answer to each held-out prompt at each beta of the sweep, the same noise each time, and its reward."""
        self._follow_reward_model(step)
        config, figures = self.config, self._of_each_beta()
        reward = figures[f"reward/mean{beta_suffix(decoding_beta(config.ilql))}"]
        if self.ranks.first:
            logger.info("step %d: held-out reward %.4f at beta %g", step, reward, decoding_beta(config.ilql))
        self._remember(step, reward)
        return {**figures, **{f"heldout/{name}": value for name, value in self.of_answers().items()}}

    def _of_each_beta(self) -> dict[str, float]:
        config, figures = self.config, dict[str, float]()
        heads = self._decoding_heads()
        with self.sampler.whole_weights():
            for beta in config.ilql.betas:
                sampler = replace(self.sampler, adjust=Steering(heads, beta))
                answers = heldout_answers(
                    sampler, self.preferences, self._baselines, config.evaluate.batch_size, config.seed, self.ranks
                )
                assert answers is not None, "nothing stops an evaluation"
                figures |= {f"{name}{beta_suffix(beta)}": value for name, value in reward_row(answers).items()}
        return figures

    @torch.no_grad()
    def of_answers(self) -> dict[str, float]:
        """Losses, V, Q and weights over the held-out answers."""
        parts: list[list[float]] = []
        mine = self.trajectories[self.ranks.rank :: self.ranks.world]
        with whole_weights(self.accelerator, self.module)(), self.accelerator.autocast():
            for piece in split_by_tokens(mine, self.micro_batch_tokens):
                tensors = to_device(self.task.collate(piece), self.accelerator.device)
                parts.append(self.module(*tensors)[1].tolist())
        everyone = [part for gathered in self.ranks.gather(parts) for part in gathered]
        merged = merge_statistics(torch.tensor(everyone, dtype=torch.float64))
        return metrics_of(merged, sum(row.actions for row in self.trajectories))

    def _decoding_heads(self) -> Any:
        """The target heads in what the language model computes in; under ZeRO-3 a copy, with which memory need not
        hold them in float32 beside the language model."""
        heads, dtype = self.module.targets.q_heads, compute_dtype(self.accelerator)
        if dtype == torch.float32 and not shards_weights(self.accelerator):
            return heads
        with whole_weights(self.accelerator, heads)():
            return copied(heads, dtype)

    def _remember(self, step: int, reward: float) -> None:
        self.best.setdefault("first_reward", reward)
        self.best["last_reward"] = reward
        if "best_reward" not in self.best or reward > self.best["best_reward"]:
            self.best |= {"best_reward": reward, "best_step": step}
            if self.config.train.save_best:
                self.keep_best(step)

    def _follow_reward_model(self, step: int) -> None:
        """Score by the model that the run uses now. Rewards of two models do not compare: the best starts anew."""
        changed = False
        if not self._begun:
            changed = self.rewards.begin(step, self.sampler.scorer)
        identity = self.rewards.announced(self.sampler.scorer)
        if identity is not None:
            self.sampler = replace(self.sampler, scorer=self.rewards.change(step, identity, self.sampler.scorer))
        if identity is not None or not self._begun:
            self._baselines = self.rescore(self.sampler)
        if changed or identity is not None:
            self.best.clear()
        self._begun = True
