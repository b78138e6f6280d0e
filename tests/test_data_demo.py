"""The demo set is made up by itself, the same every time, and teaches what a person would want taught."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.load import dump, resolve
from pipeline.data import prefetch
from pipeline.data.demo import Answer, demo_preferences, make_answer, make_prompt
from pipeline.data.demo_text import MISCHIEF, TASKS
from pipeline.data.embedded import build_tokenizer
from pipeline.data.tokens import encode, load_tokenizer
from pipeline.errors import UserError


def test_the_set_is_a_function_of_its_seed() -> None:
    assert demo_preferences(7, 50, 10) == demo_preferences(7, 50, 10)
    assert demo_preferences(7, 50, 10) != demo_preferences(8, 50, 10)


def test_no_prompt_occurs_twice_and_the_sizes_are_as_asked() -> None:
    made = demo_preferences(1000, 2400, 300)
    prompts = [pair.prompt for split in ("train", "test") for pair in made[split]]
    assert (len(made["train"]), len(made["test"])) == (2400, 300)
    assert len(set(prompts)) == 2700
    assert all(prompt.startswith("\n\nHuman: ") and prompt.endswith("\n\nAssistant:") for prompt in prompts)


def test_more_dialogues_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.demo.make_prompt", lambda random: (str(random.randint(1, 9)), TASKS[0]))
    assert len(demo_preferences(1, 5, 4)["test"]) == 4
    with pytest.raises(UserError, match=r"data\.demo: train \+ test = 10 are more .* \(9 were found\)"):
        demo_preferences(1, 6, 4)


def test_lengths_fit_the_demo_models_limits() -> None:
    train = demo_preferences(1000, 2400, 300)["train"]
    answers = [answer for pair in train for answer in (pair.chosen, pair.rejected)]
    tokenizer = build_tokenizer([pair.prompt for pair in train] + answers, 1024, 256)
    lengths = sorted(len(encode(tokenizer, answer)) + 1 for answer in answers)
    assert lengths[int(0.99 * len(lengths))] <= 48  # generate.max_new_tokens
    assert 10 <= lengths[len(lengths) // 2] <= 40
    assert max(len(encode(tokenizer, pair.prompt)) for pair in train) <= 100


def test_answers_are_scored_as_a_person_would() -> None:
    random = Random(3)
    drawn: list[Answer] = [make_answer(random, TASKS[0]) for _ in range(3000)]
    scores = {answer.text: answer.score for answer in drawn}
    best, worst = max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__)

    assert scores[best] == 3.75 and best.count("!") == 2 and any(step in best for step in TASKS[0].steps)
    # Rude at both ends, nothing between, and a part said again and again: -1.5 - 1.0 - 1.5 - 2.5.
    assert scores[worst] == -6.5 and not any(step in worst for step in TASKS[0].steps)


def test_mischief_is_best_declined_with_a_reason() -> None:
    random = Random(3)
    scores = {answer.text: answer.score for answer in (make_answer(random, MISCHIEF[0]) for _ in range(3000))}
    best, worst = max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__)
    assert MISCHIEF[0].reason in best and MISCHIEF[0].instead in best
    # Rude at both ends, compliant, and a part said again and again: -1.5 - 1.0 - 1.5 - 2.5.
    assert scores[worst] == -6.5 and MISCHIEF[0].instead not in worst


def test_about_a_quarter_of_the_prompts_ask_for_mischief() -> None:
    random = Random(1)
    subjects = [make_prompt(random)[1] for _ in range(2000)]
    assert 0.2 < sum(subject in MISCHIEF for subject in subjects) / 2000 < 0.3


def test_a_tokenizer_that_the_texts_cannot_fill_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.embedded.vocab_size: 2000 is more than"):
        build_tokenizer(["hello world"], 2000, 64)


def test_prefetch_makes_the_data_and_the_model(tmp_path: Path) -> None:
    size = {"vocab_size": 400, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 128}
    tree = {
        "model": {"path": "embedded", "num_layers_unfrozen": 1, "embedded": size},
        "data": {"source": "demo", "demo": {"train": 60, "test": 8}},
        "sandbox": {"engine": "none"},
        "train": {"seq_length": 100},
        "generate": {"max_new_tokens": 48},
        "sft": {"max_length": 100},
        "reward_model": {"max_length": 100},
        "serving": {"max_length": 128},
    }
    (tmp_path / "config.yaml").write_text(dump(resolve(tree)))

    prefetch.main(["--run", str(tmp_path), "--out", str(tmp_path / "one")])
    prefetch.main(["--run", str(tmp_path), "--out", str(tmp_path / "two")])

    result = json.loads((tmp_path / "one" / "result.json").read_text())
    assert result["artifacts"] == {"data": "data", "model": "model"}
    assert (result["values"]["train_rows"], result["values"]["test_rows"]) == (60, 8)
    for name in ("data/train.jsonl", "model/model.safetensors", "model/tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "model")
    tokenizer = load_tokenizer(tmp_path / "one" / "model")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (0, 1, 400)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (0, 1)
    # 2 embeddings of 400 x 16; a layer: 12 x 16^2 weights, 13 x 16 biases and norms; the last norm
    assert result["values"]["parameters"] == 2 * 400 * 16 + 2 * (12 * 256 + 13 * 16) + 32
    assert model(torch.tensor([[5, 6]])).logits.shape == (1, 2, 400)


def test_models_that_are_folders_stay_where_they_are(tmp_path: Path) -> None:
    config = resolve({"model": {"path": str(tmp_path)}, "reward_model": {"checkpoint": str(tmp_path)}})
    assert prefetch.take_models(config, None) == {}


def test_a_model_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"model\.path: no/such-model: neither a folder nor to be had from the hub"
    ) as caught:
        prefetch.take_models(resolve({"model": {"path": "no/such-model"}}), None)
    assert "\n" not in str(caught.value)


def test_the_two_answers_of_a_pair_always_differ() -> None:
    for seed in range(20):
        pairs = demo_preferences(seed, 300, 20)
        assert all(pair.chosen != pair.rejected for split in pairs.values() for pair in split)


def test_equal_answers_to_one_request_have_equal_scores() -> None:
    random, scores = Random(5), {}
    for _ in range(4000):
        answer = make_answer(random, TASKS[0])
        assert scores.setdefault(answer.text, answer.score) == answer.score
