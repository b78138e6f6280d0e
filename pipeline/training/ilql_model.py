"""The module that ILQL trains: a causal language model with heads, from a batch's ids to the sum of its losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.config.methods import ILQL
from pipeline.training.ilql_heads import Heads, TargetHeads
from pipeline.training.ilql_losses import Terms, ilql_terms, total_loss
from pipeline.training.split import Split
from pipeline.training.vocabulary import token_logprobs

LOSSES = ("loss", "loss_q", "loss_v", "loss_cql", "loss_awac")
SPREADS = ("mean", "std", "min", "max")


class ILQLModule(nn.Module):
    """The part of the language model that is trained, and the heads; a frozen trunk below runs without gradients.

    Everything happens in `forward`, so that a data-parallel wrapper sees it.
    """

    def __init__(self, split: Split, heads: Heads, settings: ILQL) -> None:
        super().__init__()
        self.top = split.top
        self.heads = heads
        self.targets = TargetHeads(heads)
        self._trunk = (split.trunk,)  # in a tuple, where modules are not looked for
        self._settings = settings

    def forward(
        self,
        ids: Tensor,  # (B, T), padded on the right, where causality alone hides it
        places: Tensor,  # (N,) states in the flat (B * T)
        actions: Tensor,  # (N,)
        rewards: Tensor,  # (N,)
        last: Tensor,  # (N,) bool
    ) -> tuple[Tensor, Tensor]:
        """The sum () of all terms over the N actions, and `statistics` (K,) of them, float64 without gradient.

        Only the states of actions meet a head, and none of them the whole vocabulary but for a cross-entropy.
        """
        settings = self._settings
        with torch.no_grad():
            states = self._trunk[0](ids)
        hidden = self.top.part(states).flatten(0, 1).index_select(0, places)  # (N, H)
        values = self.heads.values(hidden)
        target_q = self.targets.smallest_taken(hidden.detach(), actions)
        if settings.cql_scale:
            q, q_nll = self.heads.taken_and_nll(hidden, actions)
        else:
            q = self.heads.taken(hidden, actions)
            q_nll = torch.zeros_like(q)
        lm_nll = -token_logprobs(self.top.head, hidden, actions, 1.0, False)[0]
        terms = ilql_terms(
            q=q,
            target_q=target_q,
            values=values,
            q_nll=q_nll,
            lm_nll=lm_nll,
            rewards=rewards,
            last=last,
            tau=settings.tau,
            gamma=settings.gamma,
            beta=settings.beta,
        )
        loss = total_loss(terms, settings.cql_scale, settings.awac_scale)
        return loss, statistics(loss, terms, values, q)

    def after_step(self, step: int) -> None:
        """Let the targets follow if optimiser step `step`, counted from 1, is one at which they do."""
        if step % self._settings.steps_for_target_q_sync == 0:
            self.targets.sync(self.heads, self._settings.alpha)


@torch.no_grad()
def statistics(loss: Tensor, terms: Terms, values: Tensor, q: Tensor) -> Tensor:
    """What a batch adds to the metrics (K,), float64: sums of losses, then sum, sum of squares, minimum and maximum of
    V, of each head's Q and of the weights."""
    sums = torch.stack([loss, terms.q, terms.v, terms.cql, terms.awac]).double()
    parts = []
    for series in (values, *q, terms.awac_weight):
        wide = series.double()
        parts += [torch.stack([wide.sum(), wide.square().sum(), wide.amin(), wide.amax()])]
    return torch.cat([sums, *parts])


def merge_statistics(parts: Tensor) -> Tensor:
    """Statistics (K,) of batches or ranks together, from theirs (n, K)."""
    merged = parts.sum(dim=0)
    first = len(LOSSES)
    merged[first + 2 :: 4] = parts[:, first + 2 :: 4].amin(dim=0)
    merged[first + 3 :: 4] = parts[:, first + 3 :: 4].amax(dim=0)
    return merged


def metrics_of(merged: Tensor, count: int) -> dict[str, float]:
    """trlX's names and, for `count` actions, their values: losses/*, values/*, qvalues/i/*, awac_weight/*."""
    row = {f"losses/{name}": float(merged[at]) / count for at, name in enumerate(LOSSES)}
    spreads = merged[len(LOSSES) :].reshape(-1, 4).tolist()
    heads = [f"qvalues/{head}" for head in range(len(spreads) - 2)]
    for name, (total, squares, low, high) in zip(("values", *heads, "awac_weight"), spreads, strict=True):
        mean = total / count
        deviation = max(0.0, squares / count - mean * mean) ** 0.5
        row |= {f"{name}/{key}": value for key, value in zip(SPREADS, (mean, deviation, low, high), strict=True)}
    return row
