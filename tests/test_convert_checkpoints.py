"""Reward models as people have them, turned into model stores: every layout gives the original's own rewards."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_serving import VOCAB, save_reward_model, serving_config, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

from pipeline.errors import UserError
from pipeline.serving import model_store
from pipeline.serving.convert import convert_checkpoint
from pipeline.serving.scoring import RewardModel

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptj": ("gptj", {}),
    "gpt_neox": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "opt without a final norm": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "llama": ("llama", {"num_key_value_heads": 2}),
    "qwen2 with a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "mistral with a window": ("mistral", {"sliding_window": 5}),
}


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randrange(VOCAB) for _ in range(length)] for length in (1, 2, 9, 17, 30)]


@torch.inference_mode()
def rewards_of(model: Any, sequences: list[list[int]]) -> list[float]:
    """By Hugging Face's own forward with padding and mask: the head at each row's last real token."""
    width = max(map(len, sequences))
    ids = torch.tensor([[*row, *[7] * (width - len(row))] for row in sequences])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in sequences])
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    ends = torch.tensor([len(row) - 1 for row in sequences])
    return model.score(hidden[torch.arange(len(ids)), ends]).squeeze(1).tolist()  # type: ignore[no-any-return]


def stored_rewards(source: Path, base: Path | None, store: Path, sequences: list[list[int]], **serving: Any) -> Any:
    settings = serving_config(max_length=64, **serving).serving
    manifest = convert_checkpoint(source, base, store, settings, "lab/rm")
    assert not list(store.parent.glob("*.weights"))
    return RewardModel(store / manifest.model_name / "1" / "reward_model").score(sequences)


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_hugging_face_reward_model_keeps_its_rewards(name: str, sequences: list[list[int]], tmp_path: Path) -> None:
    kind, settings = ARCHITECTURES[name]
    source, model = save_reward_model(tmp_path / "rm", kind, **settings), tiny_model(kind, **settings)
    edit_json(source / "config.json", pad_token_id=None)
    rewards = stored_rewards(source, None, tmp_path / "store", sequences)
    assert rewards == pytest.approx(rewards_of(model, sequences), abs=2e-5)


def base_folder(folder: Path, model: Any, **changes: Any) -> Path:
    """What --base-model names: a causal language model's configuration and tokenizer; weights are not asked for."""
    model.config.save_pretrained(folder)
    causal = type(model).__name__.replace("SequenceClassification", "CausalLM")
    edit_json(folder / "config.json", architectures=[causal], id2label=None, label2id=None, num_labels=None, **changes)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def original(model: Any, old: str, new: str = "transformer.") -> dict[str, torch.Tensor]:
    """The state dict of trlX's GPTRewardModel: `transformer.*`, `v_head.weight`, and what GPT-J once stored."""
    names = {name: name.replace(old, new, 1).replace("score.", "v_head.") for name in model.state_dict()}
    weights = {names[name]: tensor for name, tensor in model.state_dict().items()}
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8).tril()
    weights["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e9)
    return weights


def shard(weights: dict[str, torch.Tensor], folder: Path, save: Any, suffix: str, index: str) -> None:
    """Half of the weights in each of two files, and an index."""
    names = sorted(weights)
    files = {name: f"{number % 2}-of-2{suffix}" for number, name in enumerate(names)}
    for file in set(files.values()):
        save({name: weights[name].clone() for name in names if files[name] == file}, folder / file)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize(
    ("kind", "prefix", "stored", "layout"),
    [
        ("gptj", "transformer.", torch.float16, "pt"),
        ("gptj", "transformer.", torch.float32, "with copies"),
        ("gpt_neox", "gpt_neox.", torch.bfloat16, "sharded bin"),
        ("gpt2", "transformer.", torch.float32, "sharded safetensors"),
        ("opt", "model.", torch.float32, "nested"),
        ("opt", "model.decoder.", torch.float16, "old pickle"),
        ("llama", "model.", torch.float32, "safetensors"),
    ],
)
def test_the_originals_layout_keeps_its_rewards(
    kind: str, prefix: str, stored: torch.dtype, layout: str, sequences: list[list[int]], tmp_path: Path
) -> None:
    model = tiny_model(kind)
    model.load_state_dict({name: tensor.to(stored).float() for name, tensor in model.state_dict().items()})
    weights = {name: t.to(stored) if t.is_floating_point() else t for name, t in original(model, prefix).items()}
    source = tmp_path / "rm"
    source.mkdir()
    if layout == "pt":
        torch.save(weights, source / "hf_ckpt.pt")
    elif layout == "with copies":
        copies = {f"model.{name}": tensor for name, tensor in weights.items() if name.startswith("transformer.")}
        torch.save({**weights, **copies, "model.lm_head.weight": torch.ones(VOCAB, 32)}, source / "hf_ckpt.pt")
    elif layout == "sharded bin":
        shard(weights, source, torch.save, ".bin", "pytorch_model.bin.index.json")
    elif layout == "sharded safetensors":
        shard(weights, source, save_file, ".safetensors", "model.safetensors.index.json")
    elif layout == "nested":
        torch.save({"module": {f"module.{name}": t for name, t in weights.items()}, "step": 3}, source / "state.pt")
    elif layout == "old pickle":
        torch.save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        save_file(weights, source / "rm.safetensors")
    base = base_folder(tmp_path / "base", model, pad_token_id=None)
    rewards = stored_rewards(source, base, tmp_path / "store", sequences)
    assert rewards == pytest.approx(rewards_of(model, sequences), abs=2e-5)


def save_original(folder: Path, name: str = "hf_ckpt.pt", **changes: Any) -> tuple[Path, Path]:
    """A GPT-J reward model in the original's layout, and its base model; `changes` lay over its weights."""
    model = tiny_model("gptj")
    weights = {**original(model, "transformer."), **{key.replace("__", "."): value for key, value in changes.items()}}
    (folder / "rm").mkdir(parents=True)
    torch.save({key: value for key, value in weights.items() if value is not None}, folder / "rm" / name)
    return folder / "rm", base_folder(folder / "base", model)


def refused(source: Path, base: Path | None, store: Path, said: str) -> None:
    """The conversion stops with one line that matches, before it writes a store."""
    with pytest.raises(UserError, match=said) as caught:
        convert_checkpoint(source, base, store, serving_config(max_length=64).serving)
    assert "\n" not in str(caught.value)
    assert not store.exists()
    assert not list(store.parent.glob("*.weights"))


@pytest.mark.parametrize("name", ["aaa.pt", "zzz.bin"])
def test_the_weights_are_found_by_content_whatever_lies_beside_them(
    name: str, sequences: list[list[int]], tmp_path: Path
) -> None:
    source, base = save_original(tmp_path, name)
    model = tiny_model("gptj")
    torch.save({"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1.0}]}, source / "optimizer.pt")
    torch.save(argparse.Namespace(lr=1.0), source / "training_args.bin")
    torch.save(model.base_model.state_dict(), source / "mmm.bin")
    torch.save({"transformer.wte.weight": torch.ones(3), "lm_head.weight": torch.ones(3)}, source / "sft.pt")
    torch.save({"v_head.weight": torch.ones(1, 32)}, source / "head.pt")
    (source / "rng.pth").write_bytes(b"no pickle at all")
    (source / "cut.safetensors").write_bytes(b"\x80")
    assert stored_rewards(source, base, tmp_path / "store", sequences) == pytest.approx(
        rewards_of(model, sequences), abs=2e-5
    )
    (source / name).unlink()
    refused(source, base, tmp_path / "other", r"rm: no file holds a reward model")
    with pytest.raises(UserError) as caught:
        convert_checkpoint(source, base, tmp_path / "other", serving_config().serving)
    for said in (
        "optimizer.pt holds an optimiser's state",
        "head.pt holds nothing but v_head.weight",
        "mmm.bin holds 23 tensors",
        "cut.safetensors is not whole or not safetensors",
        "rng.pth is not a whole file of torch.save",
        "sft.pt holds a language model, without a reward head; and 1 more",
    ):
        assert said in str(caught.value)


def test_two_files_that_both_hold_a_reward_model_are_named(tmp_path: Path) -> None:
    source, base = save_original(tmp_path)
    torch.save(torch.load(source / "hf_ckpt.pt"), source / "best.bin")
    refused(source, base, tmp_path / "store", r"rm: best\.bin and hf_ckpt\.pt each hold a reward model; leave only")
    convert_checkpoint(source / "best.bin", base, tmp_path / "store", serving_config(max_length=64).serving)


class Payload:
    """What a hostile pickle does when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("pwned", "w"))


def test_a_pickle_never_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, base = save_original(tmp_path, v_head__weight=Payload())
    monkeypatch.chdir(tmp_path)
    said = r"hf_ckpt\.pt is a pickle that needs more than tensors \(.*open\), and its code is not run"
    refused(source, base, tmp_path / "store", said)
    assert not (tmp_path / "pwned").exists()


WIDE = torch.zeros(96, 32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"transformer__ln_f__bias": None}, r"hf_ckpt\.pt: the weights do not fit GPTJ.* \(missing: transformer\.ln_f"),
        ({"transformer__ln_x__bias": torch.ones(1)}, r"\(unexpected: transformer\.ln_x\.bias\); is this its base"),
        ({"lm_head__weight": torch.ones(1)}, r"\(unexpected: lm_head\.weight\)"),
        (
            {"transformer__h__0__mlp__fc_in__weight": WIDE},
            r"wrong shape: transformer\.h\.0\.mlp\.fc_in\.\w+ is \[96, 32\] in the checkpoint, \[128, 32\] by .*base",
        ),
        ({"v_head__weight": torch.ones(2, 32)}, r"v_head\.weight has shape \[2, 32\]; a reward model's head has one"),
        ({"v_head__bias": torch.ones(1)}, r"v_head\.bias is 1, but Hugging Face's classes have no bias there"),
        ({"v_head__weight": None}, r"no file holds a reward model, .*hf_ckpt\.pt holds 25 tensors"),
        ({"v_head__weight": None, "lm_head__weight": WIDE}, r"hf_ckpt\.pt holds a language model, without a reward"),
        ({"score__weight": torch.ones(1, 32)}, r"v_head\.weight and score\.weight are the same weight, with different"),
        ({"transformer__wte__weight": torch.ones(VOCAB, 32, dtype=torch.int8)}, r"quantised: transformer\.wte\.weight"),
        ({"transformer__wte__weight": torch.ones(VOCAB - 1, 32)}, r"ids up to 96, the model's embeddings only 96 rows"),
    ],
)
def test_weights_that_do_not_fit_stop_the_conversion_by_name(changes: Any, said: str, tmp_path: Path) -> None:
    source, base = save_original(tmp_path, **changes)
    refused(source, base, tmp_path / "store", said)


def test_many_faults_are_counted(tmp_path: Path) -> None:
    source, base = save_original(tmp_path, **{f"transformer__x{n}": torch.ones(1) for n in range(9)})
    refused(source, base, tmp_path / "store", r"unexpected: transformer\.x0, .*transformer\.x4 and 4 more")


def test_a_head_with_a_bias_of_zero_and_tokens_that_were_added_are_no_fault(
    sequences: list[list[int]], tmp_path: Path
) -> None:
    model = tiny_model("gptj", vocab=VOCAB + 1)
    weights = {**original(model, "transformer."), "v_head.bias": torch.zeros(1)}
    (tmp_path / "rm").mkdir()
    torch.save(weights, tmp_path / "rm" / "pytorch_model.bin")
    base = base_folder(tmp_path / "base", tiny_model("gptj"))  # one token fewer
    rewards = stored_rewards(tmp_path / "rm", base, tmp_path / "store", [*sequences, [VOCAB, 1]])
    assert rewards == pytest.approx(rewards_of(model, [*sequences, [VOCAB, 1]]), abs=2e-5)


def test_what_a_checkpoint_lacks_is_asked_for(tmp_path: Path) -> None:
    source, base = save_original(tmp_path)
    refused(source, None, tmp_path / "store", r"rm: holds no config\.json of a known model; give .*--base-model")
    edit_json(base / "config.json", model_type="gpt2")
    refused(source, base, tmp_path / "store", r"the weights do not fit GPT2.* \(missing: .* and \d+ more; unexpected: ")
    edit_json(base / "config.json", model_type="gptj")
    (base / "config.json").rename(source / "config.json")
    (base / "tokenizer.json").unlink()
    refused(source, base, tmp_path / "store", r"rm: has no tokenizer; save it there, or give .*--base-model")
    edit_json(base / "tokenizer_config.json")
    (base / "tokenizer.json").write_text("{}")
    refused(source, base, tmp_path / "store", r"base: its tokenizer cannot be loaded ")
    refused(tmp_path / "nothing", base, tmp_path / "store", r"nothing: no such folder")
    refused(base, None, tmp_path / "store", r"base: holds no file of weights")
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refused(source, base, tmp_path / "store", r"is of a gptj and .* is of a llama; give the base model")


def test_a_classifier_of_encoders_or_of_more_labels_is_refused(tmp_path: Path) -> None:
    save_reward_model(tmp_path / "two", labels=2)
    refused(tmp_path / "two", None, tmp_path / "store", r"config\.json: the model has 2 labels; a reward model has")
    save_reward_model(tmp_path / "rm")
    (tmp_path / "rm" / "config.json").write_text(json.dumps({"model_type": "mamba", "num_hidden_layers": 1}))
    refused(tmp_path / "rm", None, tmp_path / "store", r"config\.json: makes no sequence classification model \(Unrec")
    edit_json(tmp_path / "rm" / "config.json", model_type="llama", vocab_size=9, pad_token_id=9)
    refused(tmp_path / "rm", None, tmp_path / "store", r"makes no sequence classification model \(Padding_idx must be")
    save_reward_model(tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert", "num_hidden_layers": 1}))
    refused(tmp_path / "bert", None, tmp_path / "store", r"BertForSequenceClassification has no score head")


def test_shards_that_are_as_wanted_are_linked_and_others_written_in_the_served_dtype(tmp_path: Path) -> None:
    source = save_reward_model(tmp_path / "rm", "llama")
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    shard(weights, source, save_file, ".safetensors", "model.safetensors.index.json")
    convert_checkpoint(source, None, tmp_path / "same", serving_config().serving, "x/rm")
    for name in ("0-of-2.safetensors", "1-of-2.safetensors"):
        assert (tmp_path / "same/rm/1/reward_model" / name).samefile(source / name)
    convert_checkpoint(source, None, tmp_path / "half", serving_config(dtype="bfloat16").serving, "x/rm")
    folder = tmp_path / "half/rm/1/reward_model"
    assert model_store.stored_dtypes(folder) == {"BF16"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weights[name].bfloat16()) for name in weights)
