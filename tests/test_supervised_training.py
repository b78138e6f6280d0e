"""SFT and reward-model training: only what matters carries loss; ranks, pieces and reruns change nothing."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)

from pipeline.config.load import dump, resolve
from pipeline.config.methods import SFT, Supervised
from pipeline.data import prefetch
from pipeline.data.preferences import Preference
from pipeline.data.tokens import encode, load_tokenizer
from pipeline.errors import UserError
from pipeline.procs import capture
from pipeline.resources import resource_dir
from pipeline.run.directory import Artifact, Outputs, RunDir
from pipeline.training import reward_model, sft
from pipeline.training.batches import plan_epoch, split_by_tokens
from pipeline.training.models import check_positions, disable_dropout, load_causal_lm, load_reward_model
from pipeline.training.reward_model import Pair
from pipeline.training.sft import Dialogue
from pipeline.training.supervised import learning_rate
from pipeline.training.task import Task, backward

TINY: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "num_labels": 1}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
DEEP: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
ARCHITECTURES: list[PretrainedConfig] = [
    GPTNeoXConfig(**TINY, **DEEP, max_position_embeddings=64),
    GPTJConfig(**TINY, **GPT, rotary_dim=4),
    GPT2Config(**TINY, **GPT),
    LlamaConfig(**TINY, **DEEP),
    Qwen2Config(**TINY, **DEEP, num_key_value_heads=2),
]
DIALOGUES = [Dialogue((3, 4, 5, 6, 7, 0), 3), Dialogue((8, 9, 0), 2), Dialogue((10, 11, 12, 13, 0), 1)]
PAIRS = [Pair((3, 4, 5, 6), (7, 8, 0), (9, 0)), Pair((1, 2), (3, 0), (4, 5, 6, 7, 0)), Pair((9,), (5, 0), (0,))]

each_architecture = pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: config.model_type)


def causal_lm(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    disable_dropout(model)
    return model


def classifier(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    disable_dropout(model)
    return model


@pytest.fixture(autouse=True)
def own_process_state() -> Iterator[None]:
    """The stages set up their process: repeatable kernels, accelerate's singletons, signals. Others start afresh."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    AcceleratorState._reset_state(reset_partial_state=True)


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
    sums = reward_model.pair_sums(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 2.0, 3.0]))
    loss = math.log(1 + math.exp(-1)) + math.log(2) + math.log(1 + math.exp(3))
    assert torch.allclose(sums, torch.tensor([loss, 1.5, -2.0, 3.0, 5.0], dtype=torch.float64))


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


def test_the_rate_warms_up_and_falls_to_a_tenth() -> None:
    settings = Supervised(lr=1.0, warmup_steps=3)
    rates = [learning_rate(step, 13, settings) for step in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert math.isclose(rates[8], 0.55) and 0.1 < rates[12] < 0.15


class Rank:
    """As much of an Accelerator as one rank's backward pass needs."""

    device = torch.device("cpu")
    distributed_type = "MULTI_CPU"

    def __init__(self, index: int, world: int) -> None:
        self.process_index, self.num_processes = index, world

    @contextlib.contextmanager
    def no_sync(self, _: Any) -> Iterator[None]:
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()


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


# --- the stages' commands


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run whose prefetch is done: 120 demo dialogues and a model of 13,000 weights."""
    root = tmp_path_factory.mktemp("run")
    tree = {
        "model": {
            "path": "embedded",
            "num_layers_unfrozen": 1,
            "embedded": {"vocab_size": 400, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 128},
        },
        "data": {"source": "demo", "demo": {"train": 120, "test": 31}},
        "sandbox": {"engine": "none"},
        "train": {"seq_length": 100, "tracker": "none"},
        "generate": {"max_new_tokens": 48},
        "sft": {"max_length": 100, "batch_size": 16, "lr": 3e-2, "epochs": 2},
        "reward_model": {"max_length": 100, "batch_size": 7, "lr": 5e-3, "base": "model"},
        "serving": {"max_length": 128},
    }
    (root / "config.yaml").write_text(dump(resolve(tree)))
    prefetch.main(["--run", str(root), "--out", str(root / "prefetch")])
    artifacts = {name: Artifact(f"prefetch/{name}", "0", 0) for name in ("data", "model")}
    made = RunDir(root)
    made.write_outputs(Outputs("prefetch", "f", 1, artifacts))
    return made


def read_result(out: Path) -> dict[str, Any]:
    result = json.loads((out / "result.json").read_text())
    assert result["artifacts"] == {"model": "model"}
    return dict(result["values"])


def test_sft_learns_and_a_rerun_gives_the_same_bits(run: RunDir, tmp_path: Path) -> None:
    for name in ("one", "two"):
        sft.main(["--run", str(run.root), "--out", str(tmp_path / name)])
        shutil.rmtree(run.checkpoints)

    values = read_result(tmp_path / "one")
    assert values["steps"] == 16 and values["loss"] < 0.8 * math.log(400)
    assert math.isclose(values["perplexity"], math.exp(values["loss"]))
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert json.loads((tmp_path / "one" / "progress.json").read_text())["step"] == 16

    # The reported loss, worked out again from the saved folder, one dialogue at a time.
    model = load_causal_lm(tmp_path / "one" / "model", torch.float64)
    tokenizer = load_tokenizer(tmp_path / "one" / "model")
    total, tokens = 0.0, 0
    for line in (run.root / "prefetch" / "data" / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        response = [*encode(tokenizer, row["chosen"]), tokenizer.eos_token_id]
        prompt = encode(tokenizer, row["prompt"])[-(100 - len(response)) :]  # sft.max_length is 100
        ids = torch.tensor([*prompt, *response])
        log_probs = model(ids[None]).logits[0].log_softmax(-1)
        total += F.nll_loss(log_probs[len(prompt) - 1 : -1], ids[len(prompt) :], reduction="sum").item()
        tokens += len(ids) - len(prompt)
    assert tokens == values["test_tokens"] and math.isclose(total / tokens, values["loss"], rel_tol=1e-5)


def test_one_process_and_two_give_the_same_reward_model(run: RunDir, tmp_path: Path) -> None:
    reward_model.main(["--run", str(run.root), "--out", str(tmp_path / "one")])
    shutil.rmtree(run.checkpoints)
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(resource_dir("accelerate") / "ddp-cpu.yaml")]
    work = ["-m", "pipeline.training.reward_model", "--run", str(run.root), "--out", str(tmp_path / "two")]
    status, output = capture([sys.executable, *launch, "--num_processes", "2", *work], timeout_s=300)
    assert status == 0, output

    one, two = read_result(tmp_path / "one"), read_result(tmp_path / "two")
    assert one["steps"] == two["steps"] == 18 and one["pairs"] == two["pairs"] == 31
    assert two["processes"] == 2
    for key in ("loss", "margin", "chosen_mean", "rejected_mean"):
        assert math.isclose(one[key], two[key], abs_tol=1e-4), key
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert max(float((first[key] - second[key]).abs().max()) for key in first) < 1e-4


def test_a_response_as_long_as_the_limit_still_trains(run: RunDir) -> None:
    tokenizer = load_tokenizer(run.root / "prefetch" / "model")
    preference = Preference("\n\nHuman: Hi\n\nAssistant:", " " + "word " * 50 + "end", " no")
    (dialogue,) = sft.make_dialogues([preference], tokenizer, SFT(max_length=12))
    assert (dialogue.length, dialogue.first) == (12, 1)  # nothing precedes the first token: it carries no loss
    (pair,) = reward_model.make_pairs([preference], tokenizer, 12)
    assert pair.prompt == () and len(pair.chosen) == 12
