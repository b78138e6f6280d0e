"""One phase's arithmetic: from scored responses to advantages, and from advantages to optimiser steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.config.methods import PPO
from pipeline.config.training import Optimizer, Scheduler
from pipeline.errors import UserError
from pipeline.training.advantages import gae, kl_k1, kl_k3, token_rewards, whiten
from pipeline.training.decode import Response
from pipeline.training.experience import Minibatch, Packing, collate, plan_epoch
from pipeline.training.losses import STATISTICS, ppo_loss
from pipeline.training.policy import reference_logprobs
from pipeline.training.prompts import derive_seed
from pipeline.training.ranks import Ranks
from pipeline.training.split import Top


@dataclass(frozen=True)
class Experience:
    """A phase's responses and, packed (N,) in float32, what the policies say of each sampled token."""

    responses: Sequence[Response]
    packing: Packing
    logprobs: Tensor
    reference: Tensor
    values: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Targets:
    """What a phase's losses pull towards, packed (N,)."""

    advantages: Tensor
    returns: Tensor


def plan_phase(
    lengths: Sequence[int], ppo: PPO, batch_size: int, micro: int, *seed: int | str
) -> list[list[Minibatch]]:
    """The phase's minibatches, epoch by epoch; each epoch cuts a fresh permutation of the rows."""
    plans = []
    for epoch in range(ppo.ppo_epochs):
        generator = torch.Generator().manual_seed(derive_seed(*seed, "epoch", epoch))
        order = torch.randperm(len(lengths), generator=generator).tolist()
        plans.append(plan_epoch(lengths, batch_size, micro, order))
    return plans


@torch.no_grad()
def experience(
    policy: Callable[..., Any],
    reference: Callable[[Tensor, Tensor, Tensor], Tensor],
    responses: Sequence[Response],
    first_epoch: Sequence[Minibatch],
    temperature: float,
) -> Experience:
    """Old log-probabilities, reference log-probabilities, values and entropies of all sampled tokens.

    Computed in the very micro-batches of the first epoch and through the same module, so that the first minibatch's
    ratio is exactly 1 and its KL exactly 0: anything else would be noise that the clipping acts on.
    """
    packing = Packing([len(response.tokens) for response in responses])
    total = sum(packing.lengths)
    logprobs, ref, values, entropy = (torch.empty(total, device=responses[0].states.device) for _ in range(4))
    for minibatch in first_epoch:
        for rows in minibatch:
            batch = collate(responses, rows, packing)
            outputs = policy(batch.states, batch.index, batch.targets, temperature, with_entropy=True)
            logprobs[batch.packed] = outputs.logprobs
            values[batch.packed] = outputs.values
            entropy[batch.packed] = outputs.entropy
            ref[batch.packed] = reference(batch.states, batch.index, batch.targets)
    return Experience(responses, packing, logprobs, ref, values, entropy)


def reference_function(
    top: Top, temperature: float, autocast: Callable[[], Any]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The reference policy's log-probabilities as a function of (states, index, targets)."""

    def logprobs(states: Tensor, index: Tensor, targets: Tensor) -> Tensor:
        with autocast():
            return reference_logprobs(top, states, index, targets, temperature)

    return logprobs


def targets_of(exp: Experience, scores: Sequence[float], beta: float, ppo: PPO, ranks: Ranks) -> Targets:
    """Advantages, whitened over all ranks, and returns, from one (scaled) score a response."""
    packing, device = exp.packing, exp.logprobs.device
    rewards = token_rewards(
        torch.tensor(scores, device=device, dtype=torch.float32),
        packing.pad(kl_k1(exp.logprobs, exp.reference)),
        torch.tensor(packing.lengths, device=device),
        beta,
    )
    advantages, returns = gae(rewards, packing.pad(exp.values), packing.mask(device), ppo.gamma, ppo.lam)
    return Targets(whiten(packing.pack(advantages), ranks.sum), packing.pack(returns))


def mean_kl(exp: Experience, ranks: Ranks) -> tuple[float, float]:
    """KL(policy || reference) by k3: mean nats per response, and per token, over all ranks."""
    total = kl_k3(exp.logprobs, exp.reference).double().sum()
    counts = total.new_tensor([len(exp.responses), len(exp.logprobs)])
    kl, rows, tokens = ranks.sum(torch.cat([total[None], counts])).tolist()
    return kl / rows, kl / tokens


def learning_rate(step: int, optimizer: Optimizer, scheduler: Scheduler, total_steps: int) -> float:
    """The rate of optimiser step `step` (from 0), a pure function, so there is no scheduler state to resume."""
    if step < scheduler.warmup_steps:
        return optimizer.lr * (step + 1) / scheduler.warmup_steps
    done = (step - scheduler.warmup_steps) / max(1, total_steps - scheduler.warmup_steps)
    if scheduler.name == "linear":
        return optimizer.lr * (1.0 - done)
    if scheduler.name == "cosine":
        return optimizer.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    return optimizer.lr


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
