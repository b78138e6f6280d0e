"""The check that a model store's rewards are the eager model's."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path

import pytest
import torch
from helpers_serving import save_reward_model, tiny_model

from pipeline.serving import parity
from pipeline.training.models import load_reward_model

SEQUENCES = [[1], [2, 3], [4, 5, 6], [7, 8, 9, 10]]
REFERENCE = [1.0, 2.0, 3.0, 4.0]


def test_sequences_are_scored_alone_in_groups_and_together_in_several_orders() -> None:
    asked: list[list[int]] = []

    def score(rows: list[list[int]]) -> list[float]:
        asked.append([len(row) for row in rows])
        return [float(len(row)) for row in rows]

    found = parity.compare(score, SEQUENCES, REFERENCE)
    assert asked[:4] == [[1], [2], [3], [4]]
    assert asked[4:8] == [[1, 2], [3, 4], [1, 2, 3], [4]]
    assert asked[8] == [4, 3, 2, 1]
    assert sorted(asked[9]) == asked[10] == [1, 2, 3, 4]
    assert (found.largest, found.mean, found.rewards) == (0.0, 0.0, REFERENCE)


def test_the_largest_difference_is_found_where_it_is() -> None:
    def score(rows: list[list[int]]) -> list[float]:
        """Wrong for the sequence of three, when it stands behind another."""
        return [len(row) + 0.5 * (row == SEQUENCES[2] and place == 2) for place, row in enumerate(rows)]

    found = parity.compare(score, SEQUENCES, REFERENCE)
    assert (found.largest, found.length) == (0.5, 3)
    assert found.batch in (3, 4)
    assert 0 < found.mean < 0.2


def test_one_reward_that_is_not_a_number_is_the_verdict() -> None:
    found = parity.compare(
        lambda rows: [math.nan if row == [2, 3] else float(len(row)) for row in rows], SEQUENCES, REFERENCE
    )
    assert math.isnan(found.largest)
    assert found.length == 2


@pytest.mark.parametrize("kind", ["gptj", "gpt2", "gpt_neox", "llama", "opt"])
def test_a_half_width_model_computes_in_float32_without_a_float32_copy(kind: str, tmp_path: Path) -> None:
    tiny_model(kind).to(torch.float16).save_pretrained(tmp_path)
    whole = load_reward_model(tmp_path, torch.float32, attention="eager").eval()
    halved = parity.load_reference(tmp_path, "cpu")
    assert halved.dtype == torch.float16
    before = {name: (value.data_ptr(), value.clone()) for name, value in halved.named_parameters()}
    wide: list[int] = []

    def count(*_: object) -> None:
        wide.append(sum(value.dtype == torch.float32 for value in halved.parameters()))

    for module in halved.modules():
        module.register_forward_pre_hook(count)
    for sequence in ([5], list(range(1, 60))):
        assert parity.reference_reward(halved, sequence) == parity.reference_reward(whole, sequence)
    assert max(wide) <= 2  # one layer's weight and bias
    for name, value in halved.named_parameters():
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])


def save_mixed(folder: Path, dtype: torch.dtype, wide: dict[str, torch.dtype]) -> Path:
    """A model in `dtype`, but for the weights in `wide`; in files that hold a few tensors each."""
    model = tiny_model("gptj").to(dtype)
    weights = {name: value.detach() for name, value in tiny_model("gptj").named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = weights[name].to(wide.get(name, dtype))
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def test_a_few_weights_of_another_width_leave_the_model_its_own_and_lose_no_bit(tmp_path: Path) -> None:
    wide = {
        "score.weight": torch.float32,
        "transformer.h.1.attn.q_proj.weight": torch.float32,
        "transformer.h.0.mlp.fc_in.weight": torch.bfloat16,
    }
    source = save_mixed(tmp_path, torch.float16, wide)
    model = parity.load_reference(source, "cpu")
    found = {name: value.dtype for name, value in model.named_parameters()}
    assert found == {name: wide.get(name, torch.float16) for name in found}
    whole = load_reward_model(source, torch.float32, attention="eager").eval()
    stored = dict(whole.named_parameters())
    assert all(torch.equal(value.float(), stored[name]) for name, value in model.named_parameters())
    for sequence in ([5], list(range(1, 60))):
        assert parity.reference_reward(model, sequence) == parity.reference_reward(whole, sequence)


def test_a_layer_that_fails_has_its_own_weights_again(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    model = parity.load_reference(tmp_path, "cpu")
    with pytest.raises(IndexError):
        parity.reference_reward(model, [10_000])
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


def test_a_reference_that_is_dropped_is_gone_at_once(tmp_path: Path) -> None:
    tiny_model("gptj").to(torch.float16).save_pretrained(tmp_path)
    model = parity.load_reference(tmp_path, "cpu")
    parity.reference_reward(model, [1, 2, 3])
    layer = weakref.ref(model.score)
    gc.disable()
    try:
        del model
        assert layer() is None
    finally:
        gc.enable()


def test_full_width_weights_are_left_alone(tmp_path: Path) -> None:
    model = parity.load_reference(save_reward_model(tmp_path), "cpu")
    assert not any(module._forward_pre_hooks for module in model.modules())
