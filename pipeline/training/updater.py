"""The optimiser steps of a phase."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.config.methods import PPO
from pipeline.errors import UserError
from pipeline.training.critic_warmup import begin_policy, rates_of, set_rates
from pipeline.training.distributed import backward, was_skipped
from pipeline.training.experience import Batches
from pipeline.training.losses import EXTREMES, SUMS, Tokens, ppo_loss
from pipeline.training.microbatches import Minibatch
from pipeline.training.ranks import Ranks
from pipeline.training.update import Experience, Targets

SKIPPED = -1.0
"""The norm of a step that fp16's loss scaler left out because gradients overflowed."""
KL = SUMS.index("policy/approx_kl")
RATIO = SUMS.index("ratio")


@dataclass
class Taken:
    """The optimiser steps that were taken of a phase. With the plan it says where to go on, and what to log at last."""

    sums: Tensor
    """(steps, SUMS and EXTREMES) float64: this rank's sums over tokens, and its extremes."""
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
        into micro-batches and spread over ranks does not change it. The phase ends early, and is complete, behind a
        step that found the policy more than `ppo.max_update_kl` from where it was sampled: all ranks see the same
        KL, and what is saved with the steps taken includes it. UserError when a loss or gradient is not finite.
        """
        minibatches = [minibatch for plan in plans for minibatch in plan][: last_step - first]
        tokens = self._counts(exp, minibatches)
        batches = Batches(exp.responses, exp.packing, [rows for minibatch in minibatches for rows in minibatch])
        sums = torch.zeros(len(minibatches), len(SUMS) + len(EXTREMES), dtype=torch.float64, device=self.ranks.device)
        done = len(taken.norms) if taken else 0
        if taken:
            sums[:done] = taken.sums.to(sums.device)
        norms: list[Any] = list(taken.norms) if taken else []
        over = bool(taken and taken.complete)
        while done < len(minibatches) and not over:
            if pause(first + done):
                break
            alone = first + done < self.ppo.critic_warmup_steps
            if first + done == self.ppo.critic_warmup_steps > 0:
                begin_policy(self.optimizer)
            set_rates(self.optimizer, self.rate(first + done), alone)
            sums[done], norm = self._step(exp, targets, batches, minibatches[done], tokens[done], alone)
            norms.append(norm)
            over = self._too_far(sums[done], tokens[done])
            done += 1
        complete = over or done == len(minibatches)
        result = Taken(sums[:done], [float(norm) for norm in norms], complete)
        if not done:
            return result, {}
        row = self._row(result, tokens[:done], first + done, targets.kl_weight)
        row["update/epochs"] = done / max(1, len(plans[0]))
        row["update/stopped_early"] = float(complete and done < len(minibatches))
        return result, row

    def _counts(self, exp: Experience, minibatches: Sequence[Minibatch]) -> list[float]:
        """Each minibatch's sampled tokens over all ranks."""
        counts = [sum(exp.packing.lengths[row] for rows in batch for row in rows) for batch in minibatches]
        tokens: list[float] = self.ranks.sum(torch.tensor(counts, dtype=torch.float64).to(self.ranks.device)).tolist()
        return tokens

    def _too_far(self, sums: Tensor, tokens: float) -> bool:
        """Whether this step found the policy beyond ppo.max_update_kl; the same on every rank."""
        limit = self.ppo.max_update_kl
        return limit is not None and bool(self.ranks.sum(sums[KL : KL + 1]).item() / tokens > limit)

    def _row(self, taken: Taken, tokens: Sequence[float], step: int, kl_weight: float) -> dict[str, float]:
        """Means over the steps taken, of which `tokens` were trained each."""
        everyone = self.ranks.gather_rows(taken.sums).cpu()  # (world, steps, SUMS and EXTREMES)
        means = everyone[..., : len(SUMS)].sum(dim=0) / torch.tensor(tokens)[:, None]
        if not bool(torch.isfinite(means).all()) or not all(map(math.isfinite, taken.norms)):
            raise UserError(
                f"train: a loss or gradient up to optimiser step {step} is not finite; lower optimizer.lr, or raise "
                "ppo.init_kl_coef"
            )
        row = dict(zip(SUMS, means.mean(dim=0).tolist(), strict=True))
        row["values/std"] = max(row.pop("values/squares") - row["values/mean"] ** 2, 0.0) ** 0.5
        least, greatest = everyone[..., len(SUMS) :].amax(dim=(0, 1)).tolist()
        row |= {"values/min": -least, "values/max": greatest}
        if self.ppo.advantage != "gae":  # there is no value function
            row = {name: value for name, value in row.items() if not name.startswith(("values/", "losses/value"))}
        row["losses/total_loss"] = (
            row["losses/policy_loss"]
            + self.ppo.vf_coef * row.get("losses/value_loss", 0.0)
            + kl_weight * row["losses/kl"]
            - self.ppo.entropy_coef * row["losses/entropy"]
        )
        for name, used in (("losses/kl", kl_weight), ("losses/entropy", self.ppo.entropy_coef)):
            if not used:
                del row[name]
        norms = [norm for norm in taken.norms if norm != SKIPPED]
        row["grad_norm"] = sum(norms) / max(1, len(norms))
        row["update/skipped"] = float(len(taken.norms) - len(norms))
        row["policy/approx_kl_first"] = means[0, KL].item()
        row["ratio_first"] = means[0, RATIO].item()
        alone = step <= self.ppo.critic_warmup_steps
        for place, rate in enumerate(rates_of(self.optimizer, self.rate(step - 1), alone)):
            row[f"learning_rate_group_{place}"] = rate  # the policy's, and that of its value function
        return row

    def _step(
        self, exp: Experience, targets: Targets, batches: Batches, minibatch: Minibatch, tokens: float, alone: bool
    ) -> tuple[Tensor, Any]:
        """One optimiser step; returns this rank's sums and extremes, and the gradient's norm.

        Gradients are exchanged in the last micro-batch only (ZeRO-2 and 3 do so in each). How many there are may
        differ from step to step, so where the last one is is said here and not counted by accelerate or DeepSpeed.
        """
        # Data parallelism averages gradients over ranks, accelerate or DeepSpeed over accumulation; we want their sum.
        undo_means = self.ranks.world * self.accelerator.gradient_accumulation_steps
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.ranks.device)
        extremes = torch.full((len(EXTREMES),), -math.inf, dtype=torch.float64, device=self.ranks.device)
        for place, rows in enumerate(minibatch):
            last = place == len(minibatch) - 1
            self.accelerator.sync_gradients = last
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.policy):
                batch = batches.of(rows)
                outputs = self.policy(
                    batch.states,
                    batch.lengths,
                    batch.index,
                    batch.targets,
                    self.temperature,
                    with_entropy=self.ppo.entropy_coef > 0,
                    values_alone=alone,
                    ids=batch.ids,
                )
                towards = (exp.logprobs, exp.reference, exp.values, targets.advantages, targets.returns)
                wanted = Tokens(*(packed[batch.packed] for packed in towards))
                loss = ppo_loss(
                    outputs.logprobs, outputs.values, outputs.entropy, wanted, self.ppo, targets.kl_weight, 1.0 - alone
                )
                backward(self.accelerator, loss.total * (undo_means / tokens))
            sums += loss.sums
            extremes = torch.maximum(extremes, loss.extremes)
        norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if was_skipped(self.accelerator, self.optimizer):
            norm = SKIPPED
        return torch.cat([sums, extremes]), 0.0 if norm is None else norm
