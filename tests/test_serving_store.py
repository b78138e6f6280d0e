"""Conversion of a reward model into a Triton model store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from google.protobuf import text_format
from helpers_serving import save_reward_model, serving_config, tiny_model
from safetensors.torch import load_file, save_file
from tritonclient.grpc.model_config_pb2 import ModelConfig

from pipeline.config.load import check, dump
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.serving import convert, model_store
from pipeline.serving.scoring import RewardModel


def parse(store: Path, name: str) -> ModelConfig:
    return text_format.Parse((store / name / "config.pbtxt").read_text(), ModelConfig())


def test_a_store_has_everything_that_serving_needs(tmp_path: Path) -> None:
    source, store = save_reward_model(tmp_path / "rm"), tmp_path / "store"
    manifest = convert.convert(source, store, serving_config(max_length=64).serving)
    version = store / "reward-model" / "1"
    repository = Path(convert.__file__).resolve().parents[2]
    for name in ("scoring.py", "cuts.py"):
        assert (version / name).read_bytes() == (repository / "pipeline/serving" / name).read_bytes()
    assert (version / "model.py").read_bytes() == (repository / "model_store_templates/python/model.py").read_bytes()
    assert (version / "reward_model" / "tokenizer.json").is_file()
    assert model_store.read_manifest(store) == manifest
    assert manifest.parity["max_difference"] <= 1e-5
    assert [len(answer.tokens) for answer in manifest.known_answers] == [1, 2, 3, 7, 12, 33]


def test_known_answers_are_the_models_own(tmp_path: Path) -> None:
    source = save_reward_model(tmp_path / "rm", "llama")
    manifest = convert.convert(source, tmp_path / "store", serving_config().serving)
    scorer = RewardModel(source)
    for answer in manifest.known_answers:
        assert scorer.score([answer.tokens])[0] == pytest.approx(answer.reward, abs=1e-5)


def test_weights_in_the_served_dtype_are_linked_and_others_converted(tmp_path: Path) -> None:
    source = save_reward_model(tmp_path / "rm")
    convert.convert(source, tmp_path / "a", serving_config().serving)
    linked = tmp_path / "a/reward-model/1/reward_model/model.safetensors"
    assert linked.samefile(source / "model.safetensors")
    manifest = convert.convert(source, tmp_path / "b", serving_config(dtype="bfloat16").serving)
    folder = tmp_path / "b/reward-model/1/reward_model"
    assert model_store.stored_dtypes(folder) == {"BF16"}
    assert 1e-5 < manifest.parity["max_difference"] <= manifest.parity["allowed"]


def test_config_pbtxt_is_valid_and_batches_only_when_told_to(tmp_path: Path) -> None:
    source = save_reward_model(tmp_path / "rm")
    settings = {"max_batch_tokens": 512, "max_length": 100, "num_threads": 2, "max_batch_size": 9}
    manifest = convert.convert(source, tmp_path / "a", serving_config(dynamic_batching=True, **settings).serving)
    config = parse(tmp_path / "a", "reward-model")
    assert (config.name, config.backend, config.max_batch_size) == ("reward-model", "python", 9)
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    assert not config.dynamic_batching.HasField("default_queue_policy")
    assert config.input[0].allow_ragged_batch
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert parameters == {
        "identity": manifest.identity,
        "dtype": "float32",
        "attention": "auto",
        "max_length": "100",
        "max_batch_tokens": "512",
        "num_threads": "2",
        "torch": torch.__version__,
        "transformers": manifest.versions["transformers"],
    }
    convert.convert(source, tmp_path / "b", serving_config(dynamic_batching=False).serving)
    config = parse(tmp_path / "b", "reward-model")
    assert not config.HasField("dynamic_batching")
    assert not config.input[0].allow_ragged_batch


def test_what_triton_would_not_read_is_refused() -> None:
    with pytest.raises(UserError, match=r"config\.pbtxt: Triton does not read it \(.*max_batch_sise.*\); mend"):
        model_store.parse_config('name: "rm" max_batch_sise: 3')


def test_identity_follows_content_not_place_or_batching(tmp_path: Path) -> None:
    serving = serving_config().serving
    one = convert.convert(save_reward_model(tmp_path / "1"), tmp_path / "a", serving)
    same = convert.convert(
        save_reward_model(tmp_path / "2"), tmp_path / "b", serving_config(max_batch_size=3, num_threads=2).serving
    )
    other = convert.convert(save_reward_model(tmp_path / "3", seed=5), tmp_path / "c", serving)
    half = convert.convert(tmp_path / "1", tmp_path / "d", serving_config(dtype="bfloat16").serving)
    assert one.identity == same.identity
    assert len({one.identity, other.identity, half.identity}) == 3


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [(None, "reward-model"), ("Dahoas/gptj-rm-static", "gptj-rm-static"), ("/x/my rm", "my-rm"), ("/", "reward-model")],
)
def test_the_model_is_named_after_its_checkpoint(checkpoint: str | None, name: str) -> None:
    assert model_store.model_name(serving_config().serving, checkpoint) == name
    assert model_store.model_name(serving_config(model_name="mine").serving, checkpoint) == "mine"


def test_sixteen_bit_rewards_may_be_off_by_sixteen_units_in_the_last_place() -> None:
    """Of the largest reward, or of 1: a bfloat16 has 7 bits behind its first, a float16 has 10."""
    assert model_store.allowed_difference(1e-4, "float32", [100.0]) == 1e-4
    assert model_store.allowed_difference(0.0, "bfloat16", [0.1, -4.0]) == 16 * 4.0 / 128
    assert model_store.allowed_difference(0.0, "float16", [0.1]) == 16 / 1024


def test_two_labels_are_refused_before_loading(tmp_path: Path) -> None:
    tiny_model(labels=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config\.json: the model has 2 labels"):
        convert.convert(tmp_path, tmp_path / "store", serving_config().serving)


def test_a_causal_language_model_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["GPTNeoXForCausalLM"]}))
    with pytest.raises(UserError, match="GPTNeoXForCausalLM"):
        convert.convert(tmp_path, tmp_path / "store", serving_config().serving)


def test_more_tokens_than_positions_are_refused(tmp_path: Path) -> None:
    source = save_reward_model(tmp_path / "rm", "gpt2")
    with pytest.raises(UserError, match=r"serving\.max_length: 129 is more than the 128 positions"):
        convert.convert(source, tmp_path / "store", serving_config(max_length=129).serving)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_that_do_not_fit_are_named(change: str, tmp_path: Path) -> None:
    source = save_reward_model(tmp_path / "rm")
    weights = load_file(source / "model.safetensors")
    if change == "missing":
        del weights["score.weight"]
    else:
        weights["v_head.weight"] = torch.zeros(3)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    name = "score.weight" if change == "missing" else r"v_head\.weight"
    with pytest.raises(UserError, match=rf"the weights do not fit the model \({change}: {name}\)"):
        convert.convert(source, tmp_path / "store", serving_config().serving)


def test_mask_buffers_of_old_checkpoints_are_no_fault(tmp_path: Path) -> None:
    """GPT-J checkpoints of 2022 hold their causal masks; trlX's strict loading stopped at them."""
    source = save_reward_model(tmp_path / "rm", "gptj")
    weights = load_file(source / "model.safetensors")
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    weights["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e9)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    manifest = convert.convert(source, tmp_path / "store", serving_config().serving)
    assert manifest.model_name


def test_rewards_that_are_not_numbers_fail_the_conversion(tmp_path: Path) -> None:
    source = save_reward_model(tmp_path / "rm")
    weights = load_file(source / "model.safetensors")
    weights["score.weight"][0, 0] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"serving\.parity_tolerance: .* differ from the eager model's by up to nan"):
        convert.convert(source, tmp_path / "store", serving_config().serving)


def test_the_command_writes_a_store_and_its_values(tmp_path: Path) -> None:
    source, run, out = save_reward_model(tmp_path / "rm"), RunDir(tmp_path / "run"), tmp_path / "out"
    run.root.mkdir()
    config = {**serving_config().plain(), "reward_model": {"checkpoint": str(source)}}
    run.config.write_text(dump(check(config)))
    convert.main(["--run", str(run.root), "--out", str(out)])
    result = json.loads((out / "result.json").read_text())
    assert result["artifacts"] == {"model_store": "model_store"}
    assert result["values"]["model_name"] == "rm"
    assert result["values"]["identity"] == model_store.read_manifest(out / "model_store").identity
