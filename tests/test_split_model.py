"""A model in two parts gives the whole model's numbers, and training one part trains the model."""

from __future__ import annotations

import pytest
import torch
from helpers_ppo import ARCHITECTURES, VOCAB, tiny_model

from pipeline.errors import UserError
from pipeline.training.split import frozen_reference, split_model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_equal_the_whole_model_to_the_last_bit(kind: str, side: str) -> None:
    model = tiny_model(kind)
    ids = torch.randint(0, VOCAB, (3, 11))
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :5] = mask[1, :2] = 0
    if side == "right":
        mask = mask.flip(1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        split = split_model(model, 1)
        parts = split.top(split.trunk(ids, mask, positions), mask, positions)
    assert torch.equal(whole[mask.bool()], parts[mask.bool()])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_caches_of_both_parts_continue_a_sequence(kind: str) -> None:
    split = split_model(tiny_model(kind), 2)
    ids = torch.randint(0, VOCAB, (2, 9))
    positions = torch.arange(9).expand(2, -1)
    with torch.no_grad():
        at_once = split.top(split.trunk(ids))
        caches = split.trunk.new_cache(), split.top.part.new_cache()
        for start, end in ((0, 7), (7, 8), (8, 9)):
            mask = None
            for cache in caches:
                if start:
                    mask = torch.ones(2, 1, 1, end, dtype=torch.bool)
                    cache.extend(torch.full((2,), start), end)
                else:
                    cache.reserve(2, 9)
                    cache.fill(0)
            states = split.trunk(ids[:, start:end], mask, positions[:, start:end], caches[0])
            last = split.top(states, mask, positions[:, start:end], caches[1])
    torch.testing.assert_close(last[:, -1], at_once[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_training_the_top_moves_the_model_but_neither_trunk_nor_reference(kind: str) -> None:
    model = tiny_model(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    split = split_model(model, 1)
    reference = frozen_reference(split)
    ids = torch.randint(0, VOCAB, (2, 7))
    states = split.trunk(ids).detach()
    with torch.no_grad():
        reference_before = reference(states)
    assert torch.equal(reference_before, split.top(states))

    optimizer = torch.optim.SGD([p for p in split.top.parameters() if p.requires_grad], lr=0.5)
    split.top(states).square().mean().backward()
    optimizer.step()

    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    heads = set() if kind == "gpt2" else {"lm_head"}  # GPT-2's head is its frozen embedding
    last_layer = "h.2." if kind in {"gptj", "gpt2"} else "layers.2."
    trainable = (last_layer, "norm", "ln_f", "lm_head")
    assert changed and all(any(part in name for part in trainable) for name in changed)
    assert {"lm_head"} & {name.split(".")[0] for name in changed} == heads
    assert torch.equal(reference(states), reference_before)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, split.top(split.trunk(ids)))


@pytest.mark.parametrize("layers", [-1, 0, 3, 7])
def test_a_split_without_a_trunk_is_refused(layers: int) -> None:
    with pytest.raises(UserError, match=r"num_layers_unfrozen: -?\d is not supported by PPO yet; give 1 to 2"):
        split_model(tiny_model(), layers)
