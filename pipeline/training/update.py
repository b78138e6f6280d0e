"""One phase's arithmetic: from scored responses to advantages and returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.config.methods import PPO
from pipeline.training.advantages import gae, kl_k1, kl_k3, token_rewards, whiten
from pipeline.training.decode import Response
from pipeline.training.experience import Minibatch, Packing, collate, plan_epoch
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
            outputs = policy(batch.states, batch.index, batch.targets, temperature, with_entropy=True, ids=batch.ids)
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
