"""ILQL's heads on the language model's last hidden state: one or two Q over the vocabulary, their targets, and V."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.training.sharding import exact_share, own_share
from pipeline.training.vocabulary import token_logprobs


class Heads(nn.Module):
    """The heads that are trained, under trlX's names and in its shapes: MLPs H-2H-V for Q and H-2H-1 for V.

    The last layers start at zero, unlike trlX's: every Q and V is 0 at first, so that decoding starts as the language
    model's and the slow target heads hold no random function that takes thousands of steps to fade.
    """

    def __init__(self, hidden_size: int, vocab_size: int, two_qs: bool, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.q_heads = nn.ModuleList(make_head(hidden_size, vocab_size) for _ in range(2 if two_qs else 1))
            self.v_head = make_head(hidden_size, 1)

    def values(self, hidden: Tensor) -> Tensor:
        """V (n,) of states (n, H), in at least float32."""
        values: Tensor = self.v_head(hidden).squeeze(-1)
        return values.to(torch.promote_types(values.dtype, torch.float32))

    def taken(self, hidden: Tensor, actions: Tensor) -> Tensor:
        """Q (heads, n) of `actions` (n,) in states (n, H): dot products only."""
        return taken_values(self.q_heads, hidden, actions)

    def taken_and_nll(self, hidden: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Q of the actions, and their cross-entropy under softmax(Q), both (heads, n).

        The latter needs the vocabulary: a bounded number of positions at a time, computed again for the gradient.
        """
        q, nll = [], []
        heads: Iterable[Any] = self.q_heads
        for head in heads:
            features = _features(head, hidden)
            q.append(head[2](features, actions))
            nll.append(-token_logprobs(head[2], features, actions, 1.0, False)[0])
        return torch.stack(q), torch.stack(nll)


class TargetHeads(nn.Module):
    """Slow copies of the Q heads, without gradients and in at least float32.

    Parameters, and not buffers, so that a data-parallel wrapper saves them but does not send them around at each step.
    """

    moves_without_gradients = True  # a checkpoint holds them, and no wrapper may round them: see `sharding.py: moving`

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.q_heads = copy.deepcopy(heads.q_heads).requires_grad_(False)
        # bf16 would swallow a synchronisation of 1e-4 whole
        self.q_heads.to(torch.promote_types(self.dtype, torch.float32))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.q_heads.parameters()).dtype

    @torch.no_grad()
    def smallest_taken(self, hidden: Tensor, actions: Tensor) -> Tensor:
        """The smaller target Q (n,) of `actions` (n,) in states (n, H): dot products only."""
        return taken_values(self.q_heads, hidden.to(self.dtype), actions).amin(dim=0)

    @torch.no_grad()
    def sync(self, heads: Heads, alpha: float) -> None:
        """Polyak averaging: target = alpha * trained + (1 - alpha) * target. Under ZeRO-3 each rank moves its share."""
        pairs = zip(self.q_heads.parameters(), heads.q_heads.parameters(), strict=True)
        for target, trained in pairs:
            with own_share(target) as share:
                share.lerp_(exact_share(trained).to(share.dtype), alpha)


class RowLinear(nn.Linear):
    """A linear layer that also gives some outputs alone; in its forward, for which ZeRO-3 gathers its weights."""

    def forward(self, inputs: Tensor, ids: Tensor | None = None) -> Tensor:
        """All outputs (n, V) at `inputs` (n, H), or only those of `ids` (n,): dot products with their rows of weights,
        in at least float32."""
        if ids is None:
            return super().forward(inputs)
        wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        rows = F.embedding(ids, self.weight)  # (n, H); its gradient is summed by row, in a fixed order
        return (wide * rows.to(wide.dtype)).sum(dim=-1) + self.bias[ids].to(wide.dtype)


def make_head(hidden_size: int, outputs: int) -> nn.Sequential:
    """Linear(H, 2H) - ReLU - Linear(2H, outputs), the last layer at zero."""
    first, last = nn.Linear(hidden_size, 2 * hidden_size), RowLinear(2 * hidden_size, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(first, nn.ReLU(), last)


def taken_values(q_heads: Iterable[Any], hidden: Tensor, actions: Tensor) -> Tensor:
    """Each head's output (heads, n) for `actions` (n,) alone, in at least float32."""
    return torch.stack([head[2](_features(head, hidden), actions) for head in q_heads])


def _features(head: Any, hidden: Tensor) -> Tensor:  # (n, H) -> (n, 2H)
    features: Tensor = head[1](head[0](hidden))
    return features
