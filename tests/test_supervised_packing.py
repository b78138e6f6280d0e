"""Packing: several dialogues in one row give what each gives alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers_supervised import ARCHITECTURES, DIALOGUES, Rank, causal_lm, each_architecture
from transformers import PretrainedConfig

from pipeline.config.methods import SFT
from pipeline.training import sft
from pipeline.training.packing import block_mask, pack, positions_and_segments
from pipeline.training.sft import Dialogue
from pipeline.training.task import backward


def test_rows_are_filled_longest_first() -> None:
    dialogues = [Dialogue(tuple(range(length)), 1) for length in (3, 9, 4, 12, 5)]
    rows = pack(dialogues, 10)
    assert [[example.length for example in row.examples] for row in rows] == [[12], [9], [5, 4], [3]]


def test_a_token_sees_its_own_dialogues_past_and_nothing_else() -> None:
    positions, segments = positions_and_segments([[2, 1], [2]])
    assert positions.tolist() == [[0, 1, 0], [0, 1, 0]] and segments.tolist() == [[0, 0, 1], [0, 0, -1]]
    seen = (block_mask(segments, torch.float32) == 0).squeeze(1).int().tolist()
    assert seen == [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]] * 2


@each_architecture
def test_packed_is_padded(config: PretrainedConfig) -> None:
    module: Any = sft.ResponseLoss(causal_lm(config).double())
    (padded, _) = module(*sft.collate(DIALOGUES, pad=1))
    padded.backward()
    expected = {name: value.grad.clone() for name, value in module.named_parameters()}
    module.zero_grad()

    rows = pack(DIALOGUES, 11)
    assert [len(row.examples) for row in rows] == [2, 1]
    (packed, _) = module(*sft.collate_packed(rows, pad=1))
    packed.backward()

    # The loss and its logits are float32, which is all the difference.
    assert math.isclose(packed.item(), padded.item(), rel_tol=1e-6)
    for name, value in module.named_parameters():
        assert torch.allclose(value.grad, expected[name], atol=1e-7, rtol=1e-5), name


@pytest.mark.parametrize("world", [1, 2, 4])
def test_packing_and_ranks_do_not_change_the_gradient(world: int) -> None:
    module: Any = sft.ResponseLoss(causal_lm(ARCHITECTURES[0]))
    plain = sft.make_task(SFT(), pad=1)
    backward(Rank(0, 1), module, plain, DIALOGUES, 8192)  # type: ignore[arg-type]
    expected = [value.grad.clone() for value in module.parameters()]
    module.zero_grad()

    packed = sft.make_task(SFT(packing=True, max_length=11), pad=1)
    tokens = 0
    for index in range(world):
        sums = backward(Rank(index, world), module, packed, DIALOGUES, 11)  # type: ignore[arg-type]
        tokens += sums.tokens

    assert tokens == sum(dialogue.length for dialogue in DIALOGUES)
    for value, gradient in zip(module.parameters(), expected, strict=True):
        assert torch.allclose(value.grad / world, gradient, atol=1e-7, rtol=1e-4)
