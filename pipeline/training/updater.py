"""The optimiser steps of a phase."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.config.methods import PPO
from pipeline.errors import UserError
from pipeline.training.experience import Minibatch, collate
from pipeline.training.losses import STATISTICS, ppo_loss
from pipeline.training.ranks import Ranks
from pipeline.training.update import Experience, Targets


@dataclass
class Taken:
    """The optimiser steps that were taken of a phase. With the plan it says where to go on, and what to log at last."""

    sums: Tensor
    """(steps, 2 + len(STATISTICS)) float64: this rank's sums over tokens of both losses and the statistics."""
    norms: list[float]
    """Of the gradient, a step."""
    complete: bool = False
    """Whether the phase has no further step."""


@dataclass
class Updater:
    """Takes the optimiser steps of a phase."""

    accelerator: Accelerator
    policy: torch.nn.Module
    optimizer: Any
    ppo: PPO
    ranks: Ranks
    temperature: float
    max_grad_norm: float
    rate: Callable[[int], float]

    def run(
        self,
        exp: Experience,
        targets: Targets,
        plans: Sequence[Sequence[Minibatch]],
        first: int,
        last_step: int,
        taken: Taken | None = None,
        pause: Callable[[int], bool] = lambda step: False,
    ) -> tuple[Taken, dict[str, float]]:
        """Train on the phase's minibatches, but not beyond `last_step`; return the steps taken and what to log of them.

        `first` is the step count at the phase's beginning; where steps were `taken`, training goes on behind them.
        `pause` is asked before each step, by its count, and must give every rank the same answer.

        Every loss is a sum over the minibatch's tokens of all ranks, divided by their number: how a minibatch is cut
        into micro-batches and spread over ranks does not change it. UserError when a loss or gradient is not finite.
        """
        minibatches = [minibatch for plan in plans for minibatch in plan][: last_step - first]
        counts = [sum(exp.packing.lengths[row] for rows in batch for row in rows) for batch in minibatches]
        tokens = self.ranks.sum(torch.tensor(counts, dtype=torch.float64, device=self.ranks.device)).tolist()
        sums = torch.zeros(len(minibatches), len(STATISTICS) + 2, dtype=torch.float64, device=self.ranks.device)
        norms = list(taken.norms) if taken else []
        if taken:
            sums[: len(norms)] = taken.sums.to(sums.device)
        for place in range(len(norms), len(minibatches)):
            if pause(first + place):
                break
            self._set_rate(self.rate(first + place))
            sums[place] = self._step(exp, targets, minibatches[place], tokens[place])
            norms.append(self._norm)
        done = Taken(sums[: len(norms)], norms, complete=len(norms) == len(minibatches))
        return done, self._row(done, tokens[: len(norms)], first + len(norms)) if norms else {}

    def _row(self, taken: Taken, tokens: Sequence[float], step: int) -> dict[str, float]:
        """Means over the steps taken, of which `tokens` were trained each."""
        means = (self.ranks.sum(taken.sums) / torch.tensor(tokens, device=taken.sums.device)[:, None]).cpu()
        if not bool(torch.isfinite(means).all()) or not all(map(math.isfinite, taken.norms)):
            raise UserError(
                f"train: a loss or gradient up to optimiser step {step} is not finite; lower optimizer.lr, or raise "
                "ppo.init_kl_coef"
            )
        names = ("losses/policy_loss", "losses/value_loss", *STATISTICS)
        row = dict(zip(names, means.mean(dim=0).tolist(), strict=True))
        row["losses/total_loss"] = row["losses/policy_loss"] + self.ppo.vf_coef * row["losses/value_loss"]
        row["policy/approx_kl_first"] = means[0, 2].item()
        row["ratio_first"] = means[0, 4].item()
        row["grad_norm"] = sum(taken.norms) / len(taken.norms)
        row["learning_rate_group_0"] = self.rate(step - 1)
        return row

    def _step(self, exp: Experience, targets: Targets, minibatch: Minibatch, tokens: float) -> Tensor:
        """One optimiser step; returns this rank's sums of policy loss, value loss and STATISTICS."""
        sums = torch.zeros(len(STATISTICS) + 2, dtype=torch.float64, device=self.ranks.device)
        # Data parallelism averages gradients over ranks, and accumulation over micro-batches; we want their sum.
        undo_means = self.ranks.world * len(minibatch)
        for rows in minibatch:
            with self.accelerator.accumulate(self.policy):
                batch = collate(exp.responses, rows, exp.packing)
                outputs = self.policy(batch.states, batch.index, batch.targets, self.temperature)
                loss = ppo_loss(
                    outputs.logprobs,
                    outputs.values,
                    exp.logprobs[batch.packed],
                    exp.values[batch.packed],
                    targets.advantages[batch.packed],
                    targets.returns[batch.packed],
                    self.ppo.cliprange,
                    self.ppo.cliprange_value,
                )
                total = (loss.policy + self.ppo.vf_coef * loss.value) * (undo_means / tokens)
                self.accelerator.backward(total)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                    self._norm = float(norm) if norm is not None else 0.0
                self.optimizer.step()
                self.optimizer.zero_grad()
            sums += torch.cat([torch.stack([loss.policy.detach(), loss.value.detach()]).double(), loss.statistics])
        return sums

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
