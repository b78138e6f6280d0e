"""The scoring code that server and client share."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers_serving import SMALL, VOCAB, save_reward_model, serving_config, tiny_model

from pipeline.serving import scoring
from pipeline.serving.cuts import fill, pack
from pipeline.serving.scorer import cut
from pipeline.serving.scoring import RewardModel


def draw(lengths: list[int], seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, VOCAB) for _ in range(length)] for length in lengths]


def test_packing_keeps_to_both_budgets_and_goes_from_long_to_short() -> None:
    # 10 takes the first batch with 9 (2 x 10 = 20 tokens); 4, 4, 3 fit a second; three rows are the most.
    assert pack([4, 10, 3, 9, 4, 1], max_tokens=20, max_rows=3) == [[1, 3], [0, 4, 2], [5]]


def test_a_sequence_over_the_token_budget_gets_a_batch_of_its_own() -> None:
    assert pack([50, 2], max_tokens=8, max_rows=4) == [[0], [1]]
    assert pack([], max_tokens=8, max_rows=4) == []


def test_padding_is_bounded_where_there_is_any() -> None:
    # 9 beside 10: 1 of 20 is padding. 8 as well would make it 3 of 30.
    assert pack([10, 9, 8], max_tokens=100, max_rows=9, max_padding=0.05) == [[0, 1], [2]]
    lengths = [random.Random(3).randint(1, 1000) for _ in range(300)]
    batches = pack(lengths, 8192, 64, max_padding=0.05)
    assert sorted(index for batch in batches for index in batch) == list(range(300))
    assert all(sum(lengths[i] for i in batch) >= 0.95 * len(batch) * lengths[batch[0]] for batch in batches)


def test_without_padding_only_the_sequences_own_tokens_fill_a_batch() -> None:
    assert fill([4, 10, 3, 9, 4, 1], max_tokens=20, max_rows=9) == [[1, 3], [0, 4, 2, 5]]
    assert fill([50, 2, 1], max_tokens=8, max_rows=1) == [[0], [1], [2]]


def test_a_request_is_one_forward_on_the_server() -> None:
    lengths = [random.Random(4).randint(1, 100) for _ in range(200)]
    for batch in cut(lengths, serving_config(max_batch_tokens=1024, max_batch_size=16).serving):
        assert fill([lengths[index] for index in batch], 1024, 16) == [list(range(len(batch)))]


def test_requests_to_a_graph_hold_little_padding() -> None:
    serving = serving_config().serving.model_copy(update={"flavour": "torchscript"})
    assert cut([100, 99, 50, 49], serving) == [[0, 1], [2, 3]]
    assert cut([100, 99, 50, 49], serving_config().serving) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("way", ["packed", "padded", "flash"])
@pytest.mark.parametrize("kind", SMALL)
def test_rewards_are_hugging_faces_own_pooled_logits(
    kind: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(kind).double()
    model.save_pretrained(tmp_path)
    if way == "padded":
        monkeypatch.setattr(scoring, "PACKABLE", ())
    scorer = RewardModel(tmp_path, dtype=torch.float64, max_batch_size=4)
    if way == "flash":
        install_flash(monkeypatch)
        scorer.flash = True
    sequences = draw([1, 2, 9, 9, 17, 64, 128])
    width = max(map(len, sequences))
    # Hugging Face finds the last token by the padding token, 0, which `draw` never draws.
    padded = torch.tensor([[*row, *([0] * (width - len(row)))] for row in sequences])
    with torch.no_grad():
        expected = model(input_ids=padded).logits[:, 0]
    # Rewards are handed out in float32: half a unit in its last place is 6e-8 at 1.
    torch.testing.assert_close(torch.tensor(scorer.score(sequences)).double(), expected, rtol=2e-7, atol=2e-7)


def install_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-2's function for sequences one behind the other, written out for the CPU."""

    def varlen(q, k, v, starts, starts_k, longest, longest_k, *, softmax_scale, causal, window_size):  # type: ignore[no-untyped-def]
        assert causal
        assert starts.dtype == torch.int32
        assert longest == longest_k == int((starts[1:] - starts[:-1]).max())
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
        outputs = []
        for start, end in zip(starts[:-1].tolist(), starts_k[1:].tolist(), strict=True):
            scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * (softmax_scale or q.shape[-1] ** -0.5)
            back = torch.arange(end - start)[:, None] - torch.arange(end - start)
            far = (back > window_size[0]) if window_size[0] >= 0 else torch.zeros_like(back, dtype=torch.bool)
            weights = scores.masked_fill((back < 0) | far, float("-inf")).softmax(-1)
            outputs.append(torch.einsum("hqk,khd->qhd", weights, v[start:end]))
        return torch.cat(outputs)

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = varlen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def test_packed_sequences_need_no_padding_and_few_forwards(tmp_path: Path) -> None:
    scorer = RewardModel(save_reward_model(tmp_path / "rm"), max_batch_tokens=300)
    forwards: list[int] = []
    scorer.model.base_model.register_forward_pre_hook(
        lambda _, __, given: forwards.append(given["input_ids"].numel()), with_kwargs=True
    )
    scorer.score(draw([120, 100, 80, 60, 40, 20]))
    assert forwards == [300, 120]
    assert (scorer.tokens, scorer.computed) == (420, 420)


def test_warming_up_runs_each_length_once_largest_first(tmp_path: Path) -> None:
    scorer = RewardModel(save_reward_model(tmp_path / "rm"), max_length=100, max_batch_tokens=200, max_batch_size=16)
    forwards: list[int] = []
    scorer.model.base_model.register_forward_pre_hook(
        lambda _, __, given: forwards.append(given["position_ids"].max().item() + 1), with_kwargs=True
    )
    scorer.warm_up()
    assert forwards == [1]  # a CPU has nothing to prepare
    forwards.clear()
    scorer.device = Accelerator("cpu")  # type: ignore[assignment]
    scorer.warm_up()
    assert forwards == [100, 50, 25, 12, 6, 3, 1]
    assert scorer.tokens == 0


class Accelerator(str):
    """The CPU, under another name."""

    type = "cuda"


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


def test_running_out_of_memory_halves_the_batch_and_the_budget(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = RewardModel(save_reward_model(tmp_path / "rm"), max_batch_tokens=1000)
    sequences = draw([10] * 8)
    expected = scorer.score(sequences)
    small = SmallDevice(limit=20)
    scorer.model.base_model.layers[0].register_forward_pre_hook(small)
    assert scorer.score(sequences) == pytest.approx(expected, abs=1e-5)
    assert small.seen == [80, 40, 20, 20, 40, 20, 20]
    assert "out of memory: forwards now hold at most 20 tokens" in caplog.text
    small.seen.clear()
    assert scorer.score(sequences) == pytest.approx(expected, abs=1e-5)
    assert small.seen == [20, 20, 20, 20]


def test_one_sequence_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    scorer = RewardModel(save_reward_model(tmp_path / "rm"))
    scorer.model.base_model.layers[0].register_forward_pre_hook(SmallDevice(limit=20))
    with pytest.raises(torch.OutOfMemoryError):
        scorer.score(draw([5, 21, 5]))
    assert len(scorer.score(draw([5, 20, 5]))) == 3


class SmallDevice:
    """Has memory for the activations of `limit` tokens."""

    def __init__(self, limit: int) -> None:
        self.limit, self.seen = limit, []  # type: ignore[var-annotated]

    def __call__(self, _module: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
        self.seen.append(given[0].shape[1])
        if given[0].shape[1] > self.limit:
            raise torch.OutOfMemoryError(f"no memory for {tuple(given[0].shape)}")


def test_flash_attention_is_for_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not scoring._choose_flash("flash_attention_2", cpu, torch.float32)
    assert not scoring._choose_flash("auto", gpu, torch.bfloat16)
    with pytest.raises(ValueError, match=r"serving\.attention: .* needs the package flash_attn and a GPU .* 8\.0"):
        scoring._choose_flash("flash_attention_2", gpu, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(scoring.importlib.util, "find_spec", lambda _: object())
    assert scoring._choose_flash("auto", gpu, torch.bfloat16)
    assert not scoring._choose_flash("sdpa", gpu, torch.bfloat16)
    assert not scoring._choose_flash("auto", gpu, torch.float32)


def test_a_model_with_two_labels_is_no_reward_model(tmp_path: Path) -> None:
    tiny_model("llama", labels=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no one-label `score` head"):
        RewardModel(tmp_path)
