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
from pipeline.training.distributed import backward, was_skipped
from pipeline.training.experience import Minibatch, collate
from pipeline.training.losses import STATISTICS, ppo_loss
from pipeline.training.ranks import Ranks
from pipeline.training.update import Experience, Targets


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
    _skipped: int = 0
    """Steps that fp16's loss scaling left out; their norm counts as 0."""

    def run(
        self, exp: Experience, targets: Targets, plans: Sequence[Sequence[Minibatch]], step: int, last_step: int
    ) -> tuple[int, dict[str, float]]:
        """Train on the phase's minibatches, but not beyond `last_step`; return the new step and what to log.

        Every loss is a sum over the minibatch's tokens of all ranks, divided by their number: how a minibatch is cut
        into micro-batches and spread over ranks does not change it.
        """
        minibatches = [minibatch for plan in plans for minibatch in plan][: last_step - step]
        counts = [sum(exp.packing.lengths[row] for rows in batch for row in rows) for batch in minibatches]
        tokens = self.ranks.sum(torch.tensor(counts, dtype=torch.float64, device=self.ranks.device)).tolist()
        sums = torch.zeros(len(minibatches), len(STATISTICS) + 2, dtype=torch.float64, device=self.ranks.device)
        norms = []
        for place, minibatch in enumerate(minibatches):
            self._set_rate(self.rate(step))
            sums[place] = self._step(exp, targets, minibatch, tokens[place])
            norms.append(self._norm)
            step += 1
        means = (self.ranks.sum(sums) / torch.tensor(tokens, device=sums.device)[:, None]).cpu()
        if not bool(torch.isfinite(means).all()) or not all(map(math.isfinite, norms)):
            raise UserError(
                f"train: a loss or gradient up to optimiser step {step} is not finite; lower optimizer.lr, or raise "
                "ppo.init_kl_coef"
            )
        names = ("losses/policy_loss", "losses/value_loss", *STATISTICS)
        row = dict(zip(names, means.mean(dim=0).tolist(), strict=True))
        row["losses/total_loss"] = row["losses/policy_loss"] + self.ppo.vf_coef * row["losses/value_loss"]
        row["policy/approx_kl_first"] = means[0, 2].item()
        row["ratio_first"] = means[0, 4].item()
        row["skipped_steps"], self._skipped = self._skipped, 0
        row["grad_norm"] = sum(norms) / len(norms)
        row["learning_rate_group_0"] = self.rate(step - 1)
        return step, row

    def _step(self, exp: Experience, targets: Targets, minibatch: Minibatch, tokens: float) -> Tensor:
        """One optimiser step; returns this rank's sums of policy loss, value loss and STATISTICS."""
        sums = torch.zeros(len(STATISTICS) + 2, dtype=torch.float64, device=self.ranks.device)
        # Data parallelism averages gradients over ranks, and accumulation over micro-batches; we want their sum.
        undo_means = self.ranks.world * len(minibatch)
        for rows in minibatch:
            with self.accelerator.accumulate(self.policy):
                batch = collate(exp.responses, rows, exp.packing)
                outputs = self.policy(batch.states, batch.index, batch.targets, self.temperature, ids=batch.ids)
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
                backward(self.accelerator, total)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                    self._norm = float(norm) if norm is not None else 0.0
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients and was_skipped(self.accelerator, self.optimizer):
                self._norm, self._skipped = 0.0, self._skipped + 1
            sums += torch.cat([torch.stack([loss.policy.detach(), loss.value.detach()]).double(), loss.statistics])
        return sums

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate", 1.0)
