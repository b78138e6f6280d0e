"""Counted arithmetic, by hand: which weights a token meets, and which of them are trained."""

from __future__ import annotations

import pytest
import torch
from helpers_ppo import tiny_model
from torch import nn

from pipeline.training.arithmetic import Arithmetic, arithmetic
from pipeline.training.critic import Critic
from pipeline.training.policy import Policy
from pipeline.training.split import split_model


def matrices(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.ndim >= 2)


def counts(kind: str, unfrozen: int, critic: Critic | None = None) -> tuple[Arithmetic, nn.Module]:
    model = tiny_model(kind)
    split = split_model(model, unfrozen)
    return arithmetic(split.trunk, Policy(split.top, split.hidden_size, 0, critic)), model


def test_the_parts_of_a_model_of_which_two_layers_are_trained() -> None:
    found, model = counts("gpt_neox", 1)
    layers = list(model.base_model.layers)
    hidden, vocabulary = model.config.hidden_size, model.config.vocab_size
    # A layer has 8 H^2 here: 3 of queries, keys and values, which are one matrix, 1 behind attention, 4 of the MLP.
    assert matrices(layers[-1]) == 8 * hidden * hidden
    assert found.trunk == sum(map(matrices, layers[:-1])) and found.top == 3 * hidden * hidden
    assert found.head == hidden * vocabulary + 5 * hidden * hidden
    assert found.value == 2 * hidden * hidden + 2 * hidden
    assert found.trained == found.top + found.head + found.value and found.critic == found.critic_last == 0


def test_queries_of_their_own_are_the_answers_alone() -> None:
    found, model = counts("gptj", 2)
    hidden = model.config.hidden_size
    assert found.top == 12 * hidden * hidden + 2 * hidden * hidden  # a whole layer; keys and values


def test_a_tied_head_is_multiplied_though_embeddings_are_looked_up() -> None:
    found, model = counts("gpt2", -1)
    hidden = model.config.hidden_size
    assert found.head == hidden * model.config.vocab_size + 9 * hidden * hidden
    assert found.value > 0 and found.trunk == 0


def test_a_critic_reads_prompts_too() -> None:
    one = Arithmetic(trunk=0, top=0, head=0, value=0, critic=10, critic_last=0, trained=10)
    # Values of the phase: a forward of all tokens; an epoch: forward, gradient of what enters, and of the weights.
    assert one.phase(tokens=100, response=20, epochs=3) == 2 * 10 * 100 * (1 + 3 * 3)


def test_its_last_layer_reads_answers() -> None:
    one = Arithmetic(trunk=0, top=0, head=0, value=0, critic=6, critic_last=4, trained=10)
    assert one.phase(tokens=100, response=20, epochs=3) == 2 * (6 * 100 + 4 * 20) * (1 + 3 * 3)


def test_frozen_weights_need_no_gradient_of_their_own() -> None:
    one = Arithmetic(trunk=7, top=6, head=3, value=1, critic=0, critic_last=0, trained=0)
    assert one.update(tokens=100, response=20, epochs=1) == pytest.approx(2 * (6 * 100 + 4 * 20) * 2)


def test_a_weight_that_is_spread_over_ranks_counts_whole() -> None:
    found, model = counts("gpt_neox", 1)
    split = split_model(model, 1)
    policy = Policy(split.top, split.hidden_size, 0)
    for weight in policy.parameters():
        weight.ds_shape, weight.data = weight.shape, torch.empty(0)  # as ZeRO-3 leaves them
    assert arithmetic(split.trunk, policy) == found
