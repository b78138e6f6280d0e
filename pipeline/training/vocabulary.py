"""Hidden states meet the vocabulary: log-probabilities and entropies of tokens, a bounded number of logits at a time.

A logit tensor is the largest thing that an update makes. One kernel of our own keeps the logits and nothing else for
the backward pass; where even they are too many, positions are taken in chunks, whose logits are computed again there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from pipeline.training.distributed import in_whole_weights

MAX_LOGITS = 2**25
"""Logits that exist at a time, per pass: 128 MiB in float32, 665 positions of GPT-J's vocabulary."""


def token_logprobs(
    head: nn.Module,
    hidden: Tensor,  # (n, H)
    targets: Tensor,  # (n,)
    temperature: float,
    with_entropy: bool,
    max_logits: int = MAX_LOGITS,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (n,) of `targets` under softmax(head(hidden) / temperature), and entropies (n,), in float32.

    Both carry gradients. `head` is a linear module, called as one, so that whatever wraps it (ZeRO-3's gathering,
    adapters) takes part; under ZeRO-3 all ranks are to come here at the same time, but inside of `whole_weights`. The
    temperature belongs to the policy that was sampled from. Top-k and top-p do not enter: they only shorten the tail of
    what is sampled, as in trlX.
    """

    def some(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        logprobs, entropy = _OfLogits.apply(  # type: ignore[no-untyped-call]
            head(hidden), targets, temperature, with_entropy
        )
        return logprobs, entropy if with_entropy else None

    chunks = _chunks(head, hidden, max_logits)
    if chunks == 1:
        return some(hidden, targets)
    parts = []
    for chunk in zip(hidden.tensor_split(chunks), targets.tensor_split(chunks), strict=True):
        if torch.is_grad_enabled():  # the logits are dropped, and computed again by the backward pass
            parts.append(checkpoint(some, *chunk, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(some(*chunk))
    logprobs = torch.cat([part[0] for part in parts])
    return logprobs, torch.cat([part[1] for part in parts]) if with_entropy else None


class _OfLogits(torch.autograd.Function):
    """(log-probability, entropy) of logits (n, V): s = logits / temperature, log p = s - logsumexp(s)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        scaled = _scaled(logits, temperature)
        normaliser = scaled.logsumexp(dim=-1)
        logprobs = scaled.gather(-1, targets[:, None]).squeeze(-1) - normaliser
        entropy = normaliser.new_empty(0)
        if with_entropy:  # -sum p log p = logsumexp(s) - sum p s
            probabilities = (scaled - normaliser[:, None]).exp_()
            entropy = normaliser - probabilities.mul_(scaled).sum(dim=-1)
        ctx.save_for_backward(logits, targets, normaliser, entropy)
        ctx.temperature, ctx.with_entropy = temperature, with_entropy
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """d log p_a / d s_j = [j = a] - p_j, and d H / d s_j = -p_j (log p_j + H)."""
        of_logprobs, of_entropy = gradients
        logits, targets, normaliser, entropy = ctx.saved_tensors
        logs = _scaled(logits, ctx.temperature) - normaliser[:, None]
        if ctx.with_entropy:
            probabilities = logs.exp()
            logs.add_(entropy[:, None]).mul_(of_entropy[:, None]).add_(of_logprobs[:, None])
            result = logs.mul_(probabilities).neg_()
        else:
            result = logs.exp_().mul_(-of_logprobs[:, None])
        result.scatter_add_(-1, targets[:, None], of_logprobs[:, None])
        if ctx.temperature != 1.0:
            result.div_(ctx.temperature)
        return result.to(logits.dtype), None, None, None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits in (at least) float32, divided by the temperature; not to be written to: it may be `logits` itself."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide if temperature == 1.0 else wide / temperature


def _chunks(head: nn.Module, hidden: Tensor, max_logits: int) -> int:
    """In how many parts the positions meet the head. Where its weight is spread over the ranks (ZeRO-3), each call
    gathers it, so all ranks take as many as the one with the most positions needs."""
    chunks = -(-max(1, len(hidden)) // max(1, max_logits // _vocabulary(head)))
    # Not head.weight: to DeepSpeed that is a use of the weight outside of its module, for which it is kept gathered.
    weight = next(head.parameters(recurse=False))
    if hasattr(weight, "ds_id") and distributed.is_initialized() and not in_whole_weights():
        most = torch.tensor(chunks, device=hidden.device)
        distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
        chunks = int(most)
    return chunks


def _vocabulary(head: nn.Module) -> int:
    """The head's width; a weight that ZeRO-3 has partitioned does not show it."""
    width = head.out_features
    assert isinstance(width, int), "language-model heads are linear"
    return width
