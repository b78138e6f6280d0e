"""One phase's arithmetic: from scored responses to advantages and returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.config.methods import PPO
from pipeline.training.advantages import ESTIMATORS, gae, grpo, increments, rloo, token_rewards, whiten
from pipeline.training.decode import Response
from pipeline.training.experience import Batches, Packing
from pipeline.training.figures import phase_figures
from pipeline.training.microbatches import Minibatch
from pipeline.training.policy import reference_logprobs
from pipeline.training.ranks import Ranks
from pipeline.training.split import Top
from pipeline.training.spread import merged, part_of

Reference = Callable[[Tensor, Sequence[int], Tensor, Tensor], Tensor]
"""(states, lengths, index, targets) of a micro-batch -> log-probabilities of the targets."""


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
    kl_weight: float = 0.0
    """Weight of the KL in the loss; 0 where it is paid as reward."""
    figures: dict[str, float] = field(default_factory=dict)
    """What to log of the phase, over all ranks."""


@torch.no_grad()
def experience(
    policy: Callable[..., Any],
    reference: Reference,
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
    forwards = [rows for minibatch in first_epoch for rows in minibatch]
    batches = Batches(responses, packing, forwards)
    for rows in forwards:
        batch = batches.of(rows)
        where = (batch.states, batch.lengths, batch.index, batch.targets)
        outputs = policy(*where, temperature, with_entropy=True, ids=batch.ids)
        logprobs[batch.packed] = outputs.logprobs
        values[batch.packed] = outputs.values
        entropy[batch.packed] = outputs.entropy
        ref[batch.packed] = reference(*where)
    return Experience(responses, packing, logprobs, ref, values, entropy)


def reference_function(top: Top, temperature: float, autocast: Callable[[], Any]) -> Reference:
    """The reference policy's log-probabilities."""

    def logprobs(states: Tensor, lengths: Sequence[int], index: Tensor, targets: Tensor) -> Tensor:
        with autocast():
            return reference_logprobs(top, states, lengths, index, targets, temperature)

    return logprobs


def targets_of(
    exp: Experience,
    scores: Sequence[float],
    beta: float,
    ppo: PPO,
    ranks: Ranks,
    prefixes: Sequence[Sequence[tuple[int, float]]] | None = None,
) -> Targets:
    """Advantages and returns from one (scaled) score a response, and what to log: two exchanges between ranks at most.

    `prefixes`: of each response, (tokens, score) of shorter parts of it; the score's growth is then paid where it
    arose. With a value function advantages are whitened over all ranks' tokens, returns are not. Without one a
    response's return, with its KL penalty, is compared within its group, and all its tokens get the same advantage.
    """
    packing, device = exp.packing, exp.logprobs.device
    in_reward = ppo.kl_placement == "reward"
    penalty = ESTIMATORS[ppo.kl_estimator](exp.logprobs, exp.reference)
    lengths = torch.tensor(packing.lengths, device=device)
    parts = prefixes or [[] for _ in scores]
    wholes = zip(packing.lengths, scores, strict=True)
    paid = [increments([*shorter, whole]) for shorter, whole in zip(parts, wholes, strict=True)]
    rewards = token_rewards(paid, penalty, beta if in_reward else 0.0)
    if ppo.whiten_rewards:
        rewards = whiten(rewards, merged(ranks.gather_rows(part_of(rewards)).tolist()), shift_mean=False)
    if ppo.advantage == "gae":
        padded = packing.pad(rewards), packing.pad(exp.values)
        advantages, returns = map(packing.pack, gae(*padded, packing.mask(device), ppo.gamma, ppo.lam))
    else:
        sums = packing.pad(rewards).sum(dim=1)
        compared = (rloo if ppo.advantage == "rloo" else grpo)(sums, ppo.group_size)
        advantages, returns = compared.repeat_interleave(lengths), sums.repeat_interleave(lengths)
    figures, spread = phase_figures(
        exp.responses, exp.logprobs, exp.reference, exp.entropy, exp.values, advantages, returns, ranks
    )
    if ppo.advantage == "gae":
        advantages = whiten(advantages, spread)
    else:
        del figures["values/explained_variance"]  # there is no value function
    return Targets(advantages, returns, 0.0 if in_reward else beta, figures)
