"""From sampled responses to what the losses need: packed per-token tensors, and the batches that they are read in.

Packed means: the sampled tokens of row 0, then of row 1, and so on, (N,) in all, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.training.decode import Response


@dataclass(frozen=True)
class MicroBatch:
    """Rows for one forward, right-padded, and where their sampled tokens are."""

    states: Tensor
    """(B, T, H): hidden states at the cut, zeros behind each row's end; ids (B, T) where there is no trunk."""
    index: Tensor
    """(n,): places in B*T whose hidden state predicts a sampled token."""
    targets: Tensor
    """(n,): the sampled ids."""
    packed: Tensor
    """(n,): the tokens' places in the phase's packed tensors."""
    ids: Tensor
    """(B, T): the ids at the states' positions, zeros behind each row's end."""


@dataclass(frozen=True)
class Packing:
    """Where each response's tokens are in the packed tensors."""

    lengths: list[int]

    @property
    def offsets(self) -> list[int]:
        """The packed place of each row's first token."""
        offsets, total = [], 0
        for length in self.lengths:
            offsets.append(total)
            total += length
        return offsets

    def pad(self, packed: Tensor) -> Tensor:
        """(N,) -> (rows, R), zeros behind each response."""
        return pad_sequence(list(torch.split(packed, self.lengths)), batch_first=True)

    def pack(self, padded: Tensor) -> Tensor:
        """(rows, R) -> (N,)."""
        return padded[self.mask(padded.device)]

    def mask(self, device: torch.device) -> Tensor:
        """(rows, R): true on sampled tokens."""
        lengths = torch.tensor(self.lengths, device=device)
        return torch.arange(max(self.lengths), device=device)[None, :] < lengths[:, None]


def collate(responses: Sequence[Response], rows: Sequence[int], packing: Packing) -> MicroBatch:
    """The micro-batch of some rows of a phase. Sampled ids are taken as they were sampled."""
    chosen = [responses[row] for row in rows]
    device = chosen[0].states.device
    states = pad_sequence([response.states for response in chosen], batch_first=True)  # (B, T, H)
    width = states.shape[1]
    offsets = packing.offsets
    index, packed = [], []
    for place, (row, response) in enumerate(zip(rows, chosen, strict=True)):
        first = place * width + len(response.prompt) - 1
        index.append(torch.arange(first, first + len(response.tokens)))
        packed.append(torch.arange(offsets[row], offsets[row] + len(response.tokens)))
    targets = torch.tensor([token for response in chosen for token in response.tokens])
    rows_of_ids = [torch.tensor(response.prompt + response.tokens[:-1]) for response in chosen]
    ids = pad_sequence(rows_of_ids, batch_first=True).to(device)  # (B, T)
    return MicroBatch(states, torch.cat(index).to(device), targets.to(device), torch.cat(packed).to(device), ids)


Minibatch = list[list[int]]
"""The rows of one optimiser step, by micro-batch."""


def plan_epoch(lengths: Sequence[int], batch_size: int, micro_batch_size: int, order: Sequence[int]) -> list[Minibatch]:
    """Cut the rows, in `order`, into minibatches; inside each, rows of like length share a micro-batch.

    Which rows meet in an optimiser step is left to chance; how a step is cut into forwards is not part of the result.
    """
    plan = []
    for start in range(0, len(order), batch_size):
        rows = sorted(order[start : start + batch_size], key=lambda row: (lengths[row], row))
        plan.append([rows[i : i + micro_batch_size] for i in range(0, len(rows), micro_batch_size)])
    return plan
