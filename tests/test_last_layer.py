"""A last layer that runs where it is read gives what the whole one gives there, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from helpers_ppo import ARCHITECTURES, VOCAB, tiny_model
from torch import Tensor, nn

from pipeline.config.schema import LoRA
from pipeline.training.adapters import add_adapters
from pipeline.training.last_layer import alone_in_last_layer, last_layer_at
from pipeline.training.packed import packed
from pipeline.training.split import split_model

LENGTHS = [7, 4]
PLACES = torch.tensor([4, 5, 9])
"""Predecessors of sampled tokens: two in the first row, one in the second."""


def loss_of(hidden: Tensor) -> Tensor:
    weights = torch.linspace(-1.0, 2.0, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    return (weights * hidden).sum() + hidden.square().sum()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}
    module.zero_grad()
    return found


@pytest.mark.parametrize("lora", [0, 2], ids=["plain", "adapters"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_packed_rows_have_the_whole_layers_states_and_gradients(kind: str, lora: int) -> None:
    split = split_model(tiny_model(kind, spread=3.0).double(), 2)
    add_adapters(split.top, LoRA(rank=lora), seed=1)
    states = split.trunk(torch.randint(0, VOCAB, (1, sum(LENGTHS)))).detach()
    part = split.top.part
    with packed(part, LENGTHS, states.device) as positions:
        whole = part(states, None, positions)[0, PLACES]
        loss_of(whole).backward()
        wanted = gradients(part)
        with last_layer_at(part.body, PLACES):
            found = part(states, None, positions)[0, PLACES]
        loss_of(found).backward()
    torch.testing.assert_close(found, whole, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(gradients(part), wanted, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_so_have_rows_beside_each_other(kind: str) -> None:
    model = tiny_model(kind, spread=3.0).double()
    ids, places = torch.randint(0, VOCAB, (2, 6)), torch.tensor([3, 5, 6, 11])
    whole = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    with last_layer_at(model.base_model, places):
        found = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(found[places], whole[places], atol=1e-12, rtol=1e-10)
    assert not torch.allclose(found[0], whole[0])  # elsewhere it has not run


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_its_large_products_see_the_wanted_rows_only(kind: str) -> None:
    model = tiny_model(kind)
    last = model.base_model.get_submodule("h" if kind in {"gptj", "gpt2"} else "layers")[-1]
    rows = dict[str, int]()
    linear = [name for name, module in last.named_modules() if getattr(module, "weight", torch.empty(0)).ndim == 2]
    for name in linear:
        last.get_submodule(name).register_forward_hook(
            lambda _m, inputs, _o, name=name: rows.update({name: inputs[0].flatten(0, -2).shape[0]})
        )
    with torch.no_grad(), last_layer_at(model.base_model, PLACES):
        model.base_model(input_ids=torch.randint(0, VOCAB, (1, 11)), use_cache=False)
    everywhere = {name for name, count in rows.items() if count == 11}
    assert everywhere == {"gptj": {"attn.k_proj", "attn.v_proj"}, "gpt2": {"attn.c_attn"},
                          "gpt_neox": {"attention.query_key_value"}}.get(
                              kind, {"self_attn.k_proj", "self_attn.v_proj"})  # fmt: skip
    assert {count for name, count in rows.items() if name not in everywhere} == {len(PLACES)}
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in [last, *last.children()])


def test_an_architecture_that_is_not_known_runs_whole() -> None:
    model = tiny_model("llama")
    ids = torch.randint(0, VOCAB, (1, 11))
    with torch.no_grad():
        whole = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        model.base_model.config.model_type = "another"
        assert alone_in_last_layer(model.base_model) == []
        with last_layer_at(model.base_model, PLACES):
            assert torch.equal(model.base_model(input_ids=ids, use_cache=False).last_hidden_state, whole)
