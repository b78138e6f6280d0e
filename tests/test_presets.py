"""The presets are trlX's HH table, corrected where it is wrong; `fidelity: trlx` gives the original's."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest

from pipeline.config import load
from pipeline.config.names import METHODS, SIZES, chosen_preset, preset_names
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.resources import resource_names

HH = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
NEOX = "EleutherAI/gpt-neox-20b"
ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-6}


def preset(name: str, *overrides: str) -> Config:
    return load.resolve({**load.load_preset(name), "preset": name}, overrides)


def shows(config: Config, **expected: Any) -> None:
    """Each expected value, named section__key, is the configuration's."""
    found = {name: reduce(getattr, name.split("__"), config) for name in expected}
    assert found == expected


# Written out by hand from trlX's examples/hh/ppo_hh.py: model, tokenizer, seq_length, batch, rollouts, chunk, epochs,
# rate, steps. Batches and rollouts are each process's.
PPO_TABLE = {
    "gptj": ("EleutherAI/gpt-j-6B", None, 1024, 4, 64, 16, 4, 8e-6, 10000),
    "125M": ("Dahoas/pythia-125M-static-sft", NEOX, 1024, 32, 128, 16, 4, 8e-6, 1500),
    "1B": ("Dahoas/pythia-1B-static-sft", NEOX, 1024, 8, 64, 16, 4, 6e-6, 2500),
    "6B": ("Dahoas/pythia-6B-static-sft", NEOX, 512, 4, 64, 16, 4, 8e-6, 6000),
    "20B": (NEOX, None, 512, 1, 16, 4, 2, 1e-6, 8000),  # the model's own tokenizer is the one that trlX names
}


@pytest.mark.parametrize("size", PPO_TABLE)
def test_ppo_is_trlxs_table(size: str) -> None:
    model, tokenizer, length, batch, rollouts, chunk, epochs, rate, steps = PPO_TABLE[size]
    config = preset(size)
    assert config.model_copy(update={"preset": ""}) == preset(f"ppo-{size}").model_copy(update={"preset": ""})
    shows(
        config,
        model__path=model, model__tokenizer_path=tokenizer, model__num_layers_unfrozen=2,
        train__method="ppo", train__seq_length=length, train__batch_size=batch, train__total_steps=steps,
        train__eval_interval=500, train__eval_prompts=280,
        ppo__num_rollouts=rollouts, ppo__chunk_size=chunk, ppo__ppo_epochs=epochs, ppo__init_kl_coef=0.05,
        ppo__target=6.0, ppo__horizon=10000, ppo__gamma=1.0, ppo__lam=0.95, ppo__cliprange=0.2,
        ppo__cliprange_value=0.2, ppo__vf_coef=1.0, ppo__scale_reward="running", ppo__cliprange_reward=10.0,
        generate__max_new_tokens=128, generate__top_k=0, generate__top_p=1.0, optimizer__lr=rate,
        generate__stop_sequences=("Human:", "human:", "Assistant:", "assistant:"),
        all=("prefetch", "sandbox", "convert", "serve", "train", "evaluate"),
        **{f"optimizer__{key}": value for key, value in ADAMW.items()},
    )  # fmt: skip


# examples/hh/ilql_hh.py: model, tokenizer, batch, steps.
ILQL_TABLE = {
    "gptj": ("EleutherAI/gpt-j-6B", None, 4, 20000),
    "125M": ("EleutherAI/pythia-160m-deduped", NEOX, 16, 20000),  # today's name of pythia-125m-deduped
    "1B": ("EleutherAI/pythia-1.4b-deduped", NEOX, 8, 20000),
    "6B": ("EleutherAI/pythia-6.9b-deduped", NEOX, 4, 20000),
    "20B": (NEOX, None, 1, 3000),
}


@pytest.mark.parametrize("size", ILQL_TABLE)
def test_ilql_is_trlxs_table(size: str) -> None:
    model, tokenizer, batch, steps = ILQL_TABLE[size]
    shows(
        preset(f"ilql-{size}"),
        model__path=model, model__tokenizer_path=tokenizer, model__num_layers_unfrozen=-1,
        train__method="ilql", train__seq_length=1024, train__batch_size=batch, train__total_steps=steps,
        train__eval_interval=1000, train__eval_prompts=280,
        ilql__tau=0.6, ilql__gamma=0.99, ilql__cql_scale=0.1, ilql__awac_scale=1.0, ilql__alpha=1e-4, ilql__beta=0.0,
        ilql__steps_for_target_q_sync=1, ilql__two_qs=True, ilql__betas=(1.0, 4.0), ilql__reward_chosen=1.0,
        ilql__reward_rejected=-1.0, generate__max_new_tokens=128, generate__temperature=1.0, optimizer__lr=1e-6,
        all=("prefetch", "sandbox", "convert", "serve", "train", "evaluate"),
        **{f"optimizer__{key}": value for key, value in ADAMW.items()},
    )  # fmt: skip


def test_sft_is_trlxs_for_gptj_and_the_same_over_other_models() -> None:
    shows(
        preset("sft"),
        model__path="EleutherAI/gpt-j-6B", sft__batch_size=28, sft__num_processes=7,  # trlX: 4 on each of 7
        sft__max_steps=10000, sft__epochs=100, sft__lr=1e-6, sft__betas=(0.9, 0.95), sft__weight_decay=1e-6,
        sft__max_length=1024, sft__eval_interval=1000, all=("prefetch", "sft", "convert", "evaluate"),
    )  # fmt: skip
    for size, (model, tokenizer, *_) in ILQL_TABLE.items():
        config = preset(f"sft-{size}")
        assert (config.model.path, config.model.tokenizer_path) == (model, tokenizer)
        assert ("trlX has no SFT of this size" in config.description) == (size != "gptj")


def test_the_reward_model_is_that_of_the_hh_example() -> None:
    recipe: dict[str, Any] = {
        "batch_size": 8, "epochs": 1, "warmup_steps": 100, "weight_decay": 0.01, "betas": (0.9, 0.999),
        "scheduler": "constant", "frozen_fraction": 0.5, "max_length": 1024, "checkpoint": None,
    }  # fmt: skip
    shows(
        preset("reward-model"),
        model__path="Dahoas/gptj-sft-static", reward_model__base="model", reward_model__lr=1e-5,
        all=("prefetch", "reward-model", "convert"), **{f"reward_model__{key}": recipe[key] for key in recipe},
    )  # fmt: skip
    for size in SIZES[1:]:
        config = preset(f"reward-model-{size}")
        assert config.model.path == preset(f"sft-{size}").model.path and config.sft == preset(f"sft-{size}").sft
        assert config.all == ("prefetch", "sft", "reward-model", "convert") and config.reward_model.base == "sft"
        assert {key: getattr(config.reward_model, key) for key in recipe} == recipe
        assert "trlX has none of this size" in config.description


def test_what_trains_all_layers_of_20b_is_spread_over_the_gpus() -> None:
    """Whole in bf16 with shares of the rest, 20.6e9 weights would take 82 GB and more of each of 8 GPUs."""
    assert preset("sft-20B").sft.accelerate_config == preset("ilql-20B").train.accelerate_config == "zero3"
    trained = preset("reward-model-20B")
    assert trained.sft.accelerate_config == trained.reward_model.accelerate_config == "zero3"


@pytest.mark.parametrize("method", METHODS)
def test_all_methods_read_and_are_judged_by_the_same(method: str) -> None:
    for size in SIZES:
        common, config = preset(f"ppo-{size}"), preset(f"{method}-{size}")
        assert (config.data.source, config.data.subsets) == ("Anthropic/hh-rlhf", HH)
        assert (config.generate, config.evaluate) == (common.generate, common.evaluate)
        assert config.evaluate.num_prompts == 280
        if method != "reward-model":
            assert config.reward_model.checkpoint == common.reward_model.checkpoint


@pytest.mark.parametrize(("method", "data", "top_k"), [("ppo", "rm-static", 0), ("ilql", "full-hh-rlhf", 20)])
def test_the_originals_rate_is_constant_and_ours_falls(method: str, data: str, top_k: int) -> None:
    ours, theirs = preset(method), preset(method, "fidelity=trlx")
    assert (ours.scheduler.name, ours.scheduler.final) == ("cosine", 0.1)
    changed = {key for key, value in ours.plain().items() if theirs.plain()[key] != value}
    assert changed <= {"fidelity", "scheduler", "data", "generate"}
    shows(
        theirs,
        scheduler__name="constant",
        data__source=f"Dahoas/{data}",
        data__subsets=(),
        generate__top_k=top_k,
        ppo__delta_reward=True,
        ppo__kl_estimator="k1",
    )


def test_the_originals_sft_trains_prompts_without_an_end_in_the_datas_order() -> None:
    ours, theirs = preset("sft").sft, preset("sft", "fidelity=trlx").sft
    assert (ours.scheduler, ours.loss_on, ours.append_eos, ours.shuffle) == ("cosine", "response", True, True)
    assert (theirs.scheduler, theirs.loss_on, theirs.append_eos, theirs.shuffle) == (
        "constant",
        "dialogue",
        False,
        False,
    )
    shows(preset("sft", "fidelity=trlx"), data__source="Dahoas/full-hh-rlhf", generate__top_k=20)
    shows(preset("reward-model", "fidelity=trlx"), data__source="Dahoas/rm-static", data__subsets=())


def test_what_is_asked_for_wins_over_the_original() -> None:
    config = preset("6B", "scheduler.name=linear", "fidelity=trlx")  # whichever comes first
    assert (config.fidelity, config.scheduler.name, config.data.source) == ("trlx", "linear", "Dahoas/rm-static")


def test_a_preset_without_an_original_refuses_it() -> None:
    with pytest.raises(UserError, match=r"^fidelity: trlx: preset demo corrects nothing of the original's; leave it"):
        preset("demo", "fidelity=trlx")
    with pytest.raises(UserError, match="fidelity: input should be 'corrected' or 'trlx'"):
        preset("6B", "fidelity=original")
    with pytest.raises(UserError, match="trlx: unknown key"):
        preset("6B", "trlx={}")


def test_a_run_keeps_its_fidelity() -> None:
    written = preset("6B", "fidelity=trlx").plain()
    assert load.resolve(written, ["seed=1"]).scheduler.name == "constant"
    assert load.resolve(written, ["fidelity=trlx"]).fidelity == "trlx"
    with pytest.raises(UserError, match=r"^fidelity: runs/a/config.yaml was made with trlx; .* --preset 6B --set fid"):
        load.resolve(written, ["fidelity=corrected"], where="runs/a/config.yaml")


@pytest.mark.parametrize(
    ("given", "environment", "name"),
    [
        (None, None, "gptj"),
        (None, "6B", "6B"),
        (None, "ilql", "ilql-gptj"),
        (None, "demo", "demo"),
        ("ilql", "6B", "ilql-6B"),
        ("ilql", None, "ilql-gptj"),
        ("ilql", "", "ilql-gptj"),
        ("ppo", "20B", "ppo-20B"),
        ("reward-model", "1B", "reward-model-1B"),
        ("ilql-1B", "6B", "ilql-1B"),
        ("1B", "6B", "1B"),
        ("demo", "6B", "demo"),
    ],
)
def test_config_name_is_the_size(given: str | None, environment: str | None, name: str) -> None:
    assert chosen_preset(given, {} if environment is None else {"CONFIG_NAME": environment}) == name


def test_names_that_are_none_say_which_there_are() -> None:
    for given, environment, message in [
        ("ilql-6b", "", r"--preset ilql-6b: unknown preset \(did you mean 'ilql-6B'\?\); there are: demo; ppo, ilql,"),
        (None, "7B", r"CONFIG_NAME: 7B: unknown preset \(did you mean '[16]B'\?\); there are: demo; ppo"),
        ("sft", "7B", r"CONFIG_NAME: 7B: unknown size \(did you mean '[16]B'\?\); sft has: gptj, 125M, 1B, 6B, 20B"),
        ("_hh", "", "--preset _hh: unknown preset"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            chosen_preset(given, {"CONFIG_NAME": environment})
        assert "\n" not in str(caught.value)


def test_names_and_files_are_the_same_presets() -> None:
    files = {name for name in resource_names("presets", ".yaml") if not name.startswith("_")}
    assert files == set(preset_names()) - set(SIZES) - {f"{method}-{size}" for method in METHODS for size in SIZES}
