"""ILQL's data: both answers of every preference, each with its reward on its last token, as batches of actions."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.config.methods import ILQL
from pipeline.data.preferences import Preference
from pipeline.data.tokens import encode_all, end_id, join_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXTS = 4096
"""Texts that are encoded in one call: many for the tokenizer's threads, few enough for their lists of numbers."""


@dataclass(frozen=True)
class Trajectory:
    """A prompt and one answer to it; ids from `first` on are actions, and the last of them is paid.

    That is an EOS, unless the answer is cut.
    """

    ids: array[int]
    """int32: a number costs 4 bytes, of which HH needs some 70 million."""
    first: int
    reward: float

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def actions(self) -> int:
        return len(self.ids) - self.first


def make_trajectories(
    preferences: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, max_length: int, settings: ILQL
) -> list[Trajectory]:
    """Chosen and rejected answer of each preference; a prompt is encoded once for both.

    At most `max_length` ids each, cut as `encode_pair` does; an answer that is cut has no EOS, and is paid at its last
    token. The very first token of a row is no action: there is no state before it.
    """
    end, rows = end_id(tokenizer), []
    for start in range(0, len(preferences), _TEXTS):
        part = preferences[start : start + _TEXTS]
        prompts, chosen, rejected = (
            encode_all(tokenizer, [getattr(preference, key) for preference in part])
            for key in ("prompt", "chosen", "rejected")
        )
        for prompt, good, bad in zip(prompts, chosen, rejected, strict=True):
            for answer, reward in ((good, settings.reward_chosen), (bad, settings.reward_rejected)):
                head, tail = join_pair(prompt, answer, end, max_length, end_cut=False)
                rows.append(Trajectory(array("i", head + tail), max(1, len(head)), reward))
    return [row for row in rows if row.actions > 0]


def collate(rows: Sequence[Trajectory], pad: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the losses need of a batch with N actions, row after row.

    Right-padded ids (B, T); and (N,) each: the states' places in a flat (B * T) view, which are one before their
    actions'; the actions' ids; their rewards, float32; and whether an action is its row's last.
    """
    width = max(row.length for row in rows)
    ids = torch.full((len(rows), width), pad)
    for at, row in enumerate(rows):
        ids[at, : row.length] = torch.frombuffer(row.ids, dtype=torch.int32)
    lengths = torch.tensor([row.length for row in rows])[:, None]
    firsts = torch.tensor([row.first for row in rows])[:, None]
    columns = torch.arange(width)[None, :]
    acted = (columns >= firsts) & (columns < lengths)  # (B, T)
    places = acted.flatten().nonzero().squeeze(-1) - 1
    last = (columns == lengths - 1)[acted]
    paid = torch.tensor([row.reward for row in rows])[:, None].expand(-1, width)[acted]
    return ids, places, ids[acted], paid * last, last
