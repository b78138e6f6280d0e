"""The scoring code that server and client share."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from helpers_serving import VOCAB, save_reward_model, tiny_model

from pipeline.serving.scoring import RewardModel, pack

KINDS = ["gpt_neox", "gptj", "gpt2", "llama", "qwen2"]


def draw(lengths: list[int], seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, VOCAB) for _ in range(length)] for length in lengths]


def test_packing_keeps_to_both_budgets_and_goes_from_long_to_short() -> None:
    # 10 takes the first batch with 9 (2 x 10 = 20 tokens); 4, 4, 3 fit a second; three rows are the most.
    assert pack([4, 10, 3, 9, 4, 1], max_tokens=20, max_rows=3) == [[1, 3], [0, 4, 2], [5]]


def test_a_sequence_over_the_token_budget_gets_a_batch_of_its_own() -> None:
    assert pack([50, 2], max_tokens=8, max_rows=4) == [[0], [1]]
    assert pack([], max_tokens=8, max_rows=4) == []


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_are_hugging_faces_own_pooled_logits(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind).double()
    model.save_pretrained(tmp_path)
    scorer = RewardModel(tmp_path, dtype=torch.float64, max_batch_size=4)
    sequences = draw([1, 2, 9, 17, 64, 128])
    width = max(map(len, sequences))
    # Hugging Face finds the last token by the padding token, 0, which `draw` never draws.
    padded = torch.tensor([[*row, *([0] * (width - len(row)))] for row in sequences])
    with torch.no_grad():
        expected = model(input_ids=padded).logits[:, 0]
    # Rewards are handed out in float32: half a unit in its last place is 6e-8 at 1.
    torch.testing.assert_close(torch.tensor(scorer.score(sequences)).double(), expected, rtol=2e-7, atol=2e-7)


def test_the_last_token_counts_even_when_it_is_the_padding_token(tmp_path: Path) -> None:
    model = tiny_model("gpt_neox")
    model.save_pretrained(tmp_path)
    scorer = RewardModel(tmp_path)
    ends_with_pad, without = [5, 6, 7, 0], [5, 6, 7]
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([ends_with_pad])).last_hidden_state
        expected = model.score(hidden[0, -1]).item()
    alone = scorer.score([ends_with_pad])[0]
    assert alone == pytest.approx(expected, abs=1e-6)
    assert abs(alone - scorer.score([without])[0]) > 1e-3
    assert scorer.score([ends_with_pad, draw([30])[0]])[0] == pytest.approx(expected, abs=1e-5)


def test_the_same_call_gives_the_same_bits(tmp_path: Path) -> None:
    scorer = RewardModel(save_reward_model(tmp_path / "rm"), max_batch_tokens=300)
    sequences = draw([5, 80, 33, 2, 120, 7])
    assert scorer.score(sequences) == scorer.score(sequences)
    assert scorer.score([]) == []


@pytest.mark.parametrize(
    ("sequence", "fault"),
    [([], "is empty"), ([1] * 21, "more than 20"), ([3, VOCAB], "outside 0..96"), ([-1], "outside 0..96")],
)
def test_what_has_no_reward_is_refused(sequence: list[int], fault: str, tmp_path: Path) -> None:
    scorer = RewardModel(save_reward_model(tmp_path / "rm"), max_length=20)
    with pytest.raises(ValueError, match=fault):
        scorer.score([[1, 2], sequence])


def test_running_out_of_memory_halves_the_batch_and_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = RewardModel(save_reward_model(tmp_path / "rm"), max_batch_tokens=1000)
    sequences = draw([10] * 8)
    expected = scorer.score(sequences)
    forward, sizes = scorer._forward, []

    def small_device(rows: list[list[int]]) -> list[float]:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return forward(rows)

    monkeypatch.setattr(scorer, "_forward", small_device)
    assert scorer.score(sequences) == pytest.approx(expected, abs=1e-5)
    assert sizes == [8, 4, 2, 2, 4, 2, 2]
    sizes.clear()
    scorer.score(sequences)
    assert sizes == [2, 2, 2, 2]


def test_a_model_with_two_labels_is_no_reward_model(tmp_path: Path) -> None:
    tiny_model("llama", labels=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no one-label `score` head"):
        RewardModel(tmp_path)
