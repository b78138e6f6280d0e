"""The module that ILQL trains: a causal language model with heads, from a batch's ids to the sum of its losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.config.methods import ILQL
from pipeline.training.ilql_heads import Heads, TargetHeads
from pipeline.training.ilql_losses import Terms, ilql_terms, total_loss
from pipeline.training.last_layer import last_layer_at
from pipeline.training.split import Split, Top, alias_tree
from pipeline.training.vocabulary import token_logprobs

LOSSES = ("loss", "loss_q", "loss_v", "loss_cql", "loss_awac")


class ILQLModule(nn.Module):
    """The part of the language model that is trained, and the heads; a frozen trunk below runs without gradients.

    Everything happens in `forward`, so that a data-parallel wrapper sees it.
    """

    def __init__(self, split: Split, heads: Heads, settings: ILQL) -> None:
        super().__init__()
        self.top: Top = alias_tree(split.top)  # a wrapper's hooks are not in the modules that decode
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
        with last_layer_at(self.top.part.body, places):
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
    """What a batch adds to the metrics (K,), float64: the sums of `statistic_names`, then the sum of squares, the
    minimum and the maximum of each of its series."""
    losses = torch.stack([loss, terms.q, terms.v, terms.cql, terms.awac]).double()
    series = torch.stack([values, *q, terms.awac_weight]).double()  # (S, N)
    spread = torch.stack([series.square().sum(dim=-1), series.amin(dim=-1), series.amax(dim=-1)])
    return torch.cat([losses, series.sum(dim=-1), *spread])


def statistic_names(heads: int) -> tuple[str, ...]:
    """Names, trlX's, of the sums that `statistics` begins with: divided by the number of actions, they are means."""
    return (*(f"losses/{name}" for name in LOSSES), *(f"{series}/mean" for series in series_names(heads)))


def series_names(heads: int) -> tuple[str, ...]:
    """V, each head's Q, and the weights of the language model's loss."""
    return ("values", *(f"qvalues/{head}" for head in range(heads)), "awac_weight")


def merge_statistics(parts: Tensor) -> Tensor:
    """Statistics (K,) of batches or ranks together, from theirs (n, K)."""
    merged = parts.sum(dim=0)
    series = (len(merged) - len(LOSSES)) // 4
    merged[-2 * series : -series] = parts[:, -2 * series : -series].amin(dim=0)
    merged[-series:] = parts[:, -series:].amax(dim=0)
    return merged


def metrics_of(merged: Tensor, count: int) -> dict[str, float]:
    """Under trlX's names, for `count` actions: losses/*, and mean, std, min and max of each series."""
    numbers: list[float] = merged.tolist()
    series = (len(numbers) - len(LOSSES)) // 4
    names = statistic_names(series - 2)
    row = {name: total / count for name, total in zip(names, numbers, strict=False)}
    squares, lows, highs = (numbers[len(names) + at * series :][:series] for at in range(3))
    for name, square, low, high in zip(series_names(series - 2), squares, lows, highs, strict=True):
        variance = square / count - row[f"{name}/mean"] ** 2
        row |= {f"{name}/std": max(0.0, variance) ** 0.5, f"{name}/min": low, f"{name}/max": high}
    return row
