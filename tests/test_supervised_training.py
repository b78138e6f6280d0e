"""SFT and reward-model training: only what matters carries loss; ranks and pieces change nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_supervised import (
    ARCHITECTURES,
    DEEP,
    DIALOGUES,
    PAIRS,
    TINY,
    Rank,
    causal_lm,
    classifier,
    each_architecture,
)
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, PretrainedConfig

from pipeline.config.methods import Supervised
from pipeline.errors import UserError
from pipeline.evaluation.reward_model import calibration_error, expected_calibration_error
from pipeline.training import reward_model, sft
from pipeline.training.batches import plan_epoch, split_by_tokens
from pipeline.training.models import check_positions, load_causal_lm, load_reward_model
from pipeline.training.sft import Dialogue
from pipeline.training.supervised import freeze_bottom, learning_rate
from pipeline.training.task import Task, backward

# --- what carries loss


@each_architecture
def test_sft_sums_the_responses_log_probabilities_and_no_others(config: PretrainedConfig) -> None:
    model = causal_lm(config)

    loss, _ = sft.ResponseLoss(model)(*sft.collate(DIALOGUES, pad=1))

    expected = 0.0
    for dialogue in DIALOGUES:  # one by one, through the whole model
        log_probs = model(torch.tensor([dialogue.ids])).logits[0].double().log_softmax(-1)
        expected -= sum(log_probs[at - 1, dialogue.ids[at]].item() for at in range(dialogue.first, dialogue.length))
    assert math.isclose(loss.item(), expected, rel_tol=1e-6)


@each_architecture
def test_a_pairs_rewards_are_those_of_its_two_dialogues_alone(config: PretrainedConfig) -> None:
    model = classifier(config)

    rewards = reward_model.scores(model, *reward_model.collate(PAIRS, pad=1))

    for pair, row in zip(PAIRS, rewards, strict=True):
        for answer, reward in zip((pair.chosen, pair.rejected), row, strict=True):
            hidden = model.base_model(torch.tensor([[*pair.prompt, *answer]])).last_hidden_state
            assert math.isclose(model.score(hidden[0, -1]).item(), reward.item(), abs_tol=1e-6)


def test_pair_loss_is_the_logistic_loss_of_the_margin() -> None:
    model = classifier(ARCHITECTURES[0])
    tensors = reward_model.collate(PAIRS, pad=1)
    margins = [(chosen - rejected).item() for chosen, rejected in reward_model.scores(model, *tensors)]
    expected = sum(math.log(1 + math.exp(-margin)) for margin in margins)
    assert math.isclose(reward_model.PairLoss(model)(*tensors)[0].item(), expected, rel_tol=1e-5)


def test_pair_sums_count_a_tie_as_half_right() -> None:
    chosen, rejected = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([0.0, 2.0, 3.0]).double()
    sums = reward_model.pair_sums(chosen, rejected)
    loss = math.log(1 + math.exp(-1)) + math.log(2) + math.log(1 + math.exp(3))
    assert torch.allclose(sums, torch.tensor([loss, 1.5, -2.0, 3.0, 5.0], dtype=torch.float64))


def test_centring_adds_the_square_of_the_rewards_sum() -> None:
    model = classifier(ARCHITECTURES[0])
    tensors = reward_model.collate(PAIRS, pad=1)
    rewards = reward_model.scores(model, *tensors).tolist()
    plain = sum(math.log(1 + math.exp(rejected - chosen)) for chosen, rejected in rewards)
    extra = sum((chosen + rejected) ** 2 for chosen, rejected in rewards)

    loss, sums = reward_model.PairLoss(model, center=0.5)(*tensors)

    assert math.isclose(loss.item(), plain + 0.5 * extra, rel_tol=1e-5)
    assert math.isclose(sums[0], loss.item(), rel_tol=1e-6) and math.isclose(sums[1], plain, rel_tol=1e-5)


def test_calibration_by_hand() -> None:
    sigmoid = lambda margin: 1 / (1 + math.exp(-margin))  # noqa: E731
    margins = [0.05, -0.1, 3.0, 3.1, -3.2, 0.0]
    # Confidences 0.512, 0.525 and 0.5 share the first bin, 0.953, 0.957 and 0.961 the last; the tie is half right.
    first = 1 + 0 + 0.5 - sigmoid(0.05) - sigmoid(0.1) - 0.5
    last = 1 + 1 + 0 - sigmoid(3.0) - sigmoid(3.1) - sigmoid(3.2)

    gaps = reward_model.calibration_sums(torch.tensor(margins, dtype=torch.float64)).tolist()

    error = expected_calibration_error(gaps, len(margins))
    assert math.isclose(error, (abs(first) + abs(last)) / 6)
    assert math.isclose(error, calibration_error(margins).value)


def test_dropout_is_off_everywhere() -> None:
    config = GPTNeoXConfig(**TINY, **DEEP, hidden_dropout=0.5, attention_dropout=0.5)
    model = causal_lm(config).train()
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(model(ids).logits, model(ids).logits)


# --- batches


def test_an_epoch_uses_every_example_once_in_batches_of_similar_length() -> None:
    lengths = [(17 * index) % 100 for index in range(1000)]

    batches = plan_epoch(lengths, 8, seed=1, epoch=0)

    assert sorted(index for batch in batches for index in batch) == list(range(1000))
    assert [len(batch) for batch in batches].count(8) == 125
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    assert padded < 1.15 * sum(lengths)
    assert batches == plan_epoch(lengths, 8, seed=1, epoch=0)
    assert batches != plan_epoch(lengths, 8, seed=1, epoch=1) and batches != plan_epoch(lengths, 8, seed=2, epoch=0)
    assert [batch[0] for batch in batches] != sorted(batch[0] for batch in batches)


def test_pieces_hold_at_most_the_token_budget() -> None:
    examples = [Dialogue(tuple(range(length)), 1) for length in (3, 9, 4, 30, 5)]
    pieces = split_by_tokens(examples, max_tokens=20)
    assert [[example.length for example in piece] for piece in pieces] == [[30], [9, 5], [4, 3]]


@pytest.mark.parametrize(
    ("scheduler", "middle", "last"), [("cosine", 0.55, 0.122), ("linear", 0.55, 0.19), ("constant", 1.0, 1.0)]
)
def test_the_rate_warms_up_and_falls_to_a_tenth_or_stays(scheduler: Any, middle: float, last: float) -> None:
    settings = Supervised(lr=1.0, warmup_steps=3, scheduler=scheduler)
    rates = [learning_rate(step, 13, settings) for step in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    # Steps 3 to 13 are the way down: step 8 is half of it, step 12 nine tenths. (1 + cos(0.9 pi)) / 2 = 0.02447.
    assert math.isclose(rates[8], middle) and math.isclose(rates[12], last, abs_tol=1e-3)
    assert math.isclose(learning_rate(13, 13, settings), 1.0 if scheduler == "constant" else 0.1)


def test_not_shuffled_the_batches_are_the_datas() -> None:
    assert plan_epoch([3, 1, 2, 5, 4], 2, seed=1, epoch=7, shuffled=False) == [[0, 1], [2, 3], [4]]


@each_architecture
def test_frozen_layers_and_what_is_below_get_no_gradient(config: PretrainedConfig) -> None:
    module = sft.ResponseLoss(causal_lm(config))

    assert freeze_bottom(module.model, 0.5) == 1  # of two layers

    module(*sft.collate(DIALOGUES, pad=1))[0].backward()
    trained = {name for name, value in module.model.named_parameters() if value.grad is not None}
    assert trained == {name for name, value in module.model.named_parameters() if value.requires_grad}
    tied = module.model.get_output_embeddings().weight is module.model.get_input_embeddings().weight
    layers = {name.split(".")[2] for name in trained if ".layers." in name or ".h." in name}
    others = {name for name in trained if ".layers." not in name and ".h." not in name}
    assert layers == {"1"}
    assert all("ln_f" in name or "norm" in name or "head" in name or "embed_out" in name for name in others)
    assert any("head" in name or "embed_out" in name for name in others) != tied


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", ["sft", "reward model"])
def test_ranks_and_pieces_do_not_change_the_gradient(kind: str, world: int) -> None:
    module: Any
    task: Task[Any]
    if kind == "sft":
        module, batch = sft.ResponseLoss(causal_lm(ARCHITECTURES[0])), DIALOGUES
        task = Task(lambda examples: sft.collate(examples, 1), lambda dialogue: dialogue.loss_tokens)
    else:
        module, batch = reward_model.PairLoss(classifier(ARCHITECTURES[0])), PAIRS
        task = Task(lambda examples: reward_model.collate(examples, 1), lambda _: 1)
    count = sum(task.weight(example) for example in batch)
    (module(*task.collate(batch))[0] / count).backward()
    expected = [parameter.grad.clone() for parameter in module.parameters()]

    module.zero_grad()
    for index in range(world):  # with four ranks, one has no row
        backward(Rank(index, world), module, task, batch, 8)  # type: ignore[arg-type]

    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad / world, gradient, atol=1e-7, rtol=1e-4)  # DDP averages over ranks


# --- loading


def test_a_model_with_missing_or_foreign_weights_is_refused_by_name(tmp_path: Path) -> None:
    causal_lm(ARCHITECTURES[0]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["extra.weight"] = weights.pop("gpt_neox.layers.1.mlp.dense_h_to_4h.bias")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(UserError, match=r"missing: gpt_neox.layers.1.*unexpected: extra.weight"):
        load_causal_lm(tmp_path, torch.float32)


@each_architecture
def test_only_a_training_start_may_lack_its_score_head(config: PretrainedConfig, tmp_path: Path) -> None:
    causal_lm(config).save_pretrained(tmp_path / "lm")
    with pytest.raises(UserError, match=r"score\.weight"):
        load_reward_model(tmp_path / "lm", torch.float32)

    fresh = load_reward_model(tmp_path / "lm", torch.float32, new_head=True)
    fresh.save_pretrained(tmp_path / "rm")

    again = load_reward_model(tmp_path / "rm", torch.float32)
    assert torch.equal(again.score.weight, fresh.score.weight) and again.score.weight.shape == (1, 32)


def test_a_reward_model_has_one_label(tmp_path: Path) -> None:
    classifier(GPTNeoXConfig(**{**TINY, "num_labels": 3}, **DEEP)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="3 labels"):
        load_reward_model(tmp_path, torch.float32)


def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError) as caught:
            load_causal_lm(folder, torch.float32)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@each_architecture
def test_every_architecture_says_how_many_positions_it_has(config: PretrainedConfig, tmp_path: Path) -> None:
    positions = config.n_positions if config.model_type in {"gpt2", "gptj"} else config.max_position_embeddings
    config.save_pretrained(tmp_path)
    check_positions(tmp_path, "sft.max_length", positions)
    with pytest.raises(UserError, match=f"^sft.max_length: {positions + 1} is more than the {positions} positions of"):
        check_positions(tmp_path, "sft.max_length", positions + 1)


@each_architecture
def test_a_model_without_weights_is_the_loaded_one_but_for_their_numbers(config: Any, tmp_path: Path) -> None:
    """Names, order, shapes, ties and buffers are alike; of each weight there is one number."""
    causal_lm(config).save_pretrained(tmp_path)
    loaded = (load_causal_lm(tmp_path, torch.float32), load_reward_model(tmp_path, torch.float32, new_head=True))
    empty = (
        load_causal_lm(tmp_path, torch.float32, weights=False),
        load_reward_model(tmp_path, torch.float32, new_head=True, weights=False),
    )
    for ours, theirs in zip(empty, loaded, strict=True):
        assert type(ours) is type(theirs) and ours.config.to_dict() == theirs.config.to_dict()
        assert ours.training == theirs.training
        shapes, others = ([(name, w.shape) for name, w in model.named_parameters()] for model in (ours, theirs))
        assert shapes == others
        assert all(weight.untyped_storage().nbytes() == 4 for weight in ours.parameters())
        buffers = dict(theirs.named_buffers())
        assert buffers.keys() == dict(ours.named_buffers()).keys()
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in ours.named_buffers())
