"""The parts of the decode loop: slots, segments, sampling, and what the trainer learns from its log-probabilities."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers_ppo import ARCHITECTURES, tiny_model, tokenizer

from pipeline.config.training import Generate
from pipeline.errors import UserError
from pipeline.training.critic import WideLinear
from pipeline.training.decode import decode
from pipeline.training.kv_cache import SlotCache
from pipeline.training.phase import logprob_gap
from pipeline.training.ragged import in_segments, ragged_attention, segments_of
from pipeline.training.sampling import luck_of, sample
from pipeline.training.split import Part, Split, Top, split_model
from pipeline.training.stopping import StopSequences


def test_a_slot_keeps_each_position_in_its_column_and_moves_as_one() -> None:
    cache = SlotCache(1)
    cache.reserve(rows=3, length=6)
    prompts = torch.randn(2, 2, 4, 5)  # (b, heads, T, D)
    cache.fill(1)
    assert cache.update(prompts, -prompts, 0)[0] is prompts
    cache.move(2, 0, 4)
    new = torch.randn(2, 2, 1, 5)
    cache.extend(torch.tensor([4, 3]), width=5)  # slot 1 holds 3 real columns and one of padding
    keys, values = cache.update(new, -new, 0)
    assert torch.equal(keys[0], torch.cat([prompts[1], new[0]], dim=1))
    assert torch.equal(keys[1, :, :4], torch.cat([prompts[0, :, :3], new[1]], dim=1))
    assert torch.equal(values, -keys) and not keys[1, :, 4].any()


def test_keys_and_values_are_gone_with_the_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the next batch needs their place, and Python's collector may take its time."""
    stores = list[weakref.ref[torch.Tensor]]()
    kept = SlotCache.store

    def store(self: SlotCache, layer: int, like: torch.Tensor) -> torch.Tensor:
        part = kept(self, layer, like)
        assert self._store is not None
        stores.append(weakref.ref(self._store))
        return part

    monkeypatch.setattr(SlotCache, "store", store)
    split, generator = split_model(tiny_model(), 1), torch.Generator().manual_seed(0)
    gc.disable()
    try:
        answers = decode(split, [[5, 6], [7]], Generate(max_new_tokens=4), StopSequences(tokenizer(), []), 0, generator)
        assert answers and stores and not any(reference() is not None for reference in stores)
    finally:
        gc.enable()


def test_segments_cost_least() -> None:
    assert segments_of([100, 90, 95]) == [(0, 3, 100)]
    assert segments_of([900, 30, 40, 35]) == [(0, 1, 900), (1, 4, 40)]
    assert segments_of([500]) == [(0, 1, 500)]
    assert segments_of([30, 900, 880, 40]) == [(0, 1, 30), (1, 3, 900), (3, 4, 40)]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_attention_in_segments_is_the_same_attention(kind: str) -> None:
    split = split_model(tiny_model(kind), 1)
    ids = torch.randint(0, 300, (4, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([8, 2, 3, 5])
    mask = (torch.arange(9) <= positions[:, None])[:, None, None]

    def last(segments: list[tuple[int, int, int]]) -> torch.Tensor:
        cache = split.trunk.new_cache()
        cache.reserve(4, 9)
        cache.fill(0)
        split.trunk(ids, None, torch.arange(9).expand(4, -1), cache)
        cache.extend(positions, 9)
        with in_segments(segments):
            states: torch.Tensor = split.trunk(ids.gather(1, positions[:, None]), mask, positions[:, None], cache)
        return states

    with torch.no_grad(), ragged_attention(split.trunk, split.top):
        pieces = last([(0, 1, 9), (1, 3, 4), (3, 4, 6)])
        whole = last([])
    torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=1e-5)
    assert split.trunk.body.config._attn_implementation == ("eager" if kind == "gptj" else "sdpa")
    with torch.no_grad():
        torch.testing.assert_close(pieces[0, 0], split.trunk(ids)[0, -1], atol=1e-6, rtol=1e-5)


# On a CPU autocast cannot run GPT-2's trunk in bfloat16.
@pytest.mark.parametrize(
    ("kind", "layers"),
    [(kind, layers) for kind in ARCHITECTURES for layers in (1, -1) if (kind, layers) != ("gpt2", 1)],
)
def test_under_autocast_the_cache_has_the_type_that_attention_computes_in(
    kind: str, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 top over a bfloat16 trunk, and a model that is float32 throughout: its keys leave the rotation in
    float32, beside values in bfloat16, but are rounded where they meet the queries. A cache as wide as the keys gives
    the very same answers."""
    split = split_model(tiny_model(kind, spread=3.0).to(torch.bfloat16), layers)
    for parameter in split.top.parameters():
        parameter.data = parameter.data.float()
    types: set[torch.dtype] = set()
    real = SlotCache.store

    def store(cache: SlotCache, layer: int, like: torch.Tensor) -> torch.Tensor:
        kept = real(cache, layer, like)
        types.add(kept.dtype)
        return kept

    def wide(cache: SlotCache, layer: int, like: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return store(cache, layer, like)

    def answers() -> list[tuple[list[int], list[float]]]:
        prompts, stops = [[5, 6, 7], [8], [9, 10]], StopSequences(tokenizer(), [])
        with torch.autocast("cpu", torch.bfloat16):
            found = decode(split, prompts, Generate(max_new_tokens=6), stops, -1, torch.Generator().manual_seed(0))
        return [(response.tokens, response.logprobs.tolist()) for response in found]

    monkeypatch.setattr(SlotCache, "store", store)
    narrow = answers()
    assert types == {torch.bfloat16}
    types.clear()
    monkeypatch.setattr(SlotCache, "store", wide)
    assert answers() == narrow
    rotated = layers == -1 and kind not in ("gpt2", "gptj")  # GPT-J rounds its keys itself
    assert types == {torch.float32 if rotated else torch.bfloat16}


class Identity(torch.nn.Module):
    """The trunk of a model whose every layer is trained: what it says of an id is the id."""

    def forward(self, ids: torch.Tensor, *_: object) -> torch.Tensor:
        return ids

    def new_cache(self) -> SlotCache:
        return SlotCache(0)


def test_where_everything_is_trained_the_states_are_the_ids() -> None:
    model = tiny_model(spread=3.0)
    split = split_model(model, 1)
    whole = Split(model, Identity(), Top(Part(model.base_model, takes_ids=True), model.lm_head), tied=False)  # type: ignore[arg-type]
    prompts, stops = [[5, 6, 7], [8], [9, 10]], StopSequences(tokenizer(), [])
    answers = [
        decode(one, prompts, Generate(max_new_tokens=6), stops, -1, torch.Generator().manual_seed(0), side_by_side=2)
        for one in (split, whole)
    ]
    for expected, response in zip(*answers, strict=True):
        assert response.tokens == expected.tokens
        assert response.states.tolist() == (response.prompt + response.tokens)[:-1]


def test_a_rows_luck_is_its_own() -> None:
    few, many = (luck_of(rows, 6, torch.Generator().manual_seed(1)) for rows in (2, 5))
    assert torch.equal(few, many[:2])
    assert len(many.unique()) == many.numel() and many.min() >= 0 and many.max() < 1


def test_sampling_inverts_the_cumulative_distribution() -> None:
    scores = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]])).expand(5, -1)
    luck = torch.tensor([0.0, 0.09, 0.11, 0.69, 1.0 - 2.0**-50], dtype=torch.float64)
    tokens, logprobs = sample(scores, luck, Generate())
    assert tokens.tolist() == [0, 0, 1, 2, 3]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.1, 0.1, 0.4, 0.2, 0.3]))
    tokens, logprobs = sample(scores, luck, Generate(top_k=2))  # 1 and 3 remain, with 4/7 and 3/7
    assert tokens.tolist() == [1, 1, 1, 3, 3]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.4, 0.4, 0.4, 0.3, 0.3]))


def test_the_gap_between_sampler_and_trainer_is_told_in_nats_a_token() -> None:
    told = [SimpleNamespace(logprobs=torch.tensor([-1.0, -2.0])), SimpleNamespace(logprobs=torch.tensor([-3.0]))]
    exp = SimpleNamespace(responses=told, logprobs=torch.tensor([-1.0, -2.5, -2.75]))
    alone = SimpleNamespace(sum=lambda tensor: tensor, gather=lambda value: [value])
    row = logprob_gap(exp, alone)  # type: ignore[arg-type]
    assert row == {"rollout/logprob_gap_mean": 0.25, "rollout/logprob_gap_max": 0.5}


def test_scores_that_are_not_numbers_are_one_line() -> None:
    scores = torch.zeros(2, 5)
    scores[1, 3] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        sample(scores, torch.full((2,), 0.5, dtype=torch.float64), Generate())


@pytest.mark.parametrize("autocast", [False, True])
def test_values_of_a_policy_in_bfloat16_are_not_rounded_to_it(autocast: bool) -> None:
    last = WideLinear(torch.nn.Linear(4, 1, dtype=torch.bfloat16))
    torch.nn.init.constant_(last.weight, 1.0)
    torch.nn.init.zeros_(last.bias)
    states = torch.tensor([[1.0, 2**-9, 2**-9, 2**-9]], dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = last(states)
    assert value.dtype == torch.float32 and value.item() == 1.0 + 3 * 2**-9
