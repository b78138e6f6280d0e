"""From sampled responses to what the losses need: packed per-token tensors, and the batches that they are read in.

Packed means: the sampled tokens of row 0, then of row 1, and so on, (N,) in all, without padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.training.decode import Response


@dataclass(frozen=True)
class MicroBatch:
    """Rows for one forward, one behind the other, T tokens in all, and where their sampled tokens are."""

    lengths: tuple[int, ...]
    """The rows' tokens."""
    states: Tensor
    """(1, T, H): hidden states at the cut; ids (1, T) where there is no trunk."""
    index: Tensor
    """(n,): places in T whose hidden state predicts a sampled token."""
    targets: Tensor
    """(n,): the sampled ids."""
    packed: Tensor
    """(n,): the tokens' places in the phase's packed tensors."""
    ids: Tensor
    """(1, T): the ids at the states' positions."""


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


class Batches:
    """The micro-batches of a phase. Where their tokens are is worked out once, and sent to the device at once."""

    def __init__(self, responses: Sequence[Response], packing: Packing, forwards: Iterable[Sequence[int]]) -> None:
        self._responses = responses
        self._slices: dict[tuple[int, ...], slice] = {}
        offsets = packing.offsets
        places, end = [], 0
        for rows in forwards:
            if tuple(rows) in self._slices:
                continue
            before = 0
            for row in rows:
                first = before + len(responses[row].prompt) - 1
                steps = torch.arange(packing.lengths[row])
                places.append(torch.stack([first + steps, offsets[row] + steps]))
                before += len(responses[row].states)
            start, end = end, end + sum(packing.lengths[row] for row in rows)
            self._slices[tuple(rows)] = slice(start, end)
        device = responses[0].states.device
        self._places = torch.cat(places, dim=1).to(device)  # (2, all forwards' tokens)
        self._targets = torch.tensor([token for response in responses for token in response.tokens]).to(device)  # (N,)
        ids = torch.tensor([token for each in responses for token in [*each.prompt, *each.tokens[:-1]]])
        self._ids = torch.split(ids.to(device), [len(response.states) for response in responses])

    def of(self, rows: Sequence[int]) -> MicroBatch:
        """The micro-batch of some rows. Sampled ids are taken as they were sampled."""
        parts = [self._responses[row].states for row in rows]
        index, packed = self._places[:, self._slices[tuple(rows)]]
        ids = torch.cat([self._ids[row] for row in rows])
        lengths = tuple(len(part) for part in parts)
        return MicroBatch(lengths, torch.cat(parts)[None], index, self._targets[packed], packed, ids[None])


def collate(responses: Sequence[Response], rows: Sequence[int], packing: Packing) -> MicroBatch:
    """One micro-batch, of some rows of a phase."""
    return Batches(responses, packing, [rows]).of(rows)
