"""A model in two parts gives the whole model's numbers, and training one part trains the model."""

from __future__ import annotations

import pytest
import torch
from helpers_ppo import ARCHITECTURES, VOCAB, tiny_model

from pipeline.errors import UserError
from pipeline.training.split import alias_tree, frozen_reference, split_model


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
        for start, end in ((0, 6), (6, 7), (7, 9)):
            states = split.trunk(ids[:, start:end], torch.ones(2, end), positions[:, start:end], caches[0])
            last = split.top(states, torch.ones(2, end), positions[:, start:end], caches[1])
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


ALL = [-1, 3]  # with the embeddings, and without


@pytest.mark.parametrize("layers", ALL)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_without_a_trunk_ids_enter_and_top_and_reference_are_the_whole_model(kind: str, layers: int) -> None:
    """trlX's reference for -1 lacks the first layer."""
    model = tiny_model(kind, spread=3.0)
    ids = torch.randint(0, VOCAB, (3, 11))
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        split = split_model(model, layers)
        states = split.trunk(ids, mask, positions, split.trunk.new_cache())
        assert torch.equal(states, ids)
        for top in (split.top, frozen_reference(split)):
            assert torch.equal(top(states, mask, positions)[mask.bool()], whole[mask.bool()])


@pytest.mark.parametrize("layers", ALL)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_with_all_layers_trained_everything_moves_but_the_reference(kind: str, layers: int) -> None:
    model = tiny_model(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    split = split_model(model, layers)
    reference = frozen_reference(split)
    ids = torch.randint(0, VOCAB, (2, 7))
    with torch.no_grad():
        reference_before = reference(ids)
    trained = [p for p in split.top.parameters() if p.requires_grad]
    split.top(ids).square().mean().backward()
    torch.optim.SGD(trained, lr=0.5).step()

    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    embeddings = {name for name in before if name.split(".")[1] in {"embed_in", "wte", "wpe", "embed_tokens"}}
    assert embeddings <= moved if layers == -1 else not embeddings & moved
    assert ("lm_head.weight" in moved) == (layers == -1 or not split.tied) == (layers == -1 or kind != "gpt2")
    assert all(any(f".{layer}." in name for name in moved) for layer in range(3))
    assert torch.equal(reference(ids), reference_before)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, split.top(ids))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_top_without_a_trunk_has_a_cache_of_all_layers(kind: str) -> None:
    split = split_model(tiny_model(kind), -1)
    ids = torch.randint(0, VOCAB, (2, 9))
    positions = torch.arange(9).expand(2, -1)
    cache = split.top.part.new_cache()
    with torch.no_grad():
        split.top(ids[:, :6], torch.ones(2, 6), positions[:, :6], cache)
        last = split.top(ids[:, 6:], torch.ones(2, 9), positions[:, 6:], cache)
        torch.testing.assert_close(last[:, -1], split.top(ids)[:, -1], atol=1e-5, rtol=1e-5)
    assert len(cache.layers) == 3 and split.trunk.new_cache().layers == []


def test_hooks_in_a_twin_are_not_called_by_the_model() -> None:
    split = split_model(tiny_model(), 1)
    called: list[str] = []
    for module in alias_tree(split.top).modules():
        module.register_forward_pre_hook(lambda *_: called.append("twin"))
    with torch.no_grad():
        split.top(split.trunk(torch.tensor([[1, 2]])))
    assert not called


@pytest.mark.parametrize("layers", [-2, 0, 4])
def test_a_number_of_layers_that_the_model_does_not_have_is_refused(layers: int) -> None:
    with pytest.raises(
        UserError, match=rf"num_layers_unfrozen: {layers} does not fit the model's 3 layers; give 1 to 3,"
    ):
        split_model(tiny_model(), layers)
