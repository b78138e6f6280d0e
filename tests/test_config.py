"""The configuration is strict, and says in one line what is wrong with it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline import submit
from pipeline.config import load
from pipeline.config.checks import check_selected
from pipeline.config.reference import render_reference
from pipeline.errors import UserError


def demo(*overrides: str, cluster: str | None = None):
    return load.resolve(load.load_preset("demo"), overrides, cluster)


def test_a_preset_survives_being_written_and_read(tmp_path: Path) -> None:
    for name in ("demo", "20B", "ilql", "sft", "reward-model"):
        config = load.resolve({**load.load_preset(name), "preset": name})
        (tmp_path / "config.yaml").write_text(load.dump(config))
        assert load.read_config(tmp_path) == config


def test_an_override_changes_one_value_and_leaves_the_rest() -> None:
    config = demo("ppo.lam=0.9", "optimizer.lr=1e-4", "generate.stop_sequences=['Human:']")
    assert config.ppo.lam == 0.9
    assert config.optimizer.lr == 1e-4  # YAML 1.1 alone would read a string
    assert config.generate.stop_sequences == ("Human:",)
    assert config.ppo.gamma == demo().ppo.gamma


def test_numbers_are_read_as_people_write_them() -> None:
    config = demo("optimizer.lr=1", "optimizer.eps=1e-9", "train.total_steps=1e3", "data.revision=1234e56")
    assert (config.optimizer.lr, config.optimizer.eps, config.train.total_steps) == (1.0, 1e-9, 1000)
    assert config.data.revision == "1234e56"  # a commit, not a number


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.init_kl_coeff=1", "ppo.init_kl_coeff: unknown key (did you mean 'init_kl_coef'?)"),
        ("trian.batch_size=1", "trian: unknown key (did you mean 'train'?)"),
        ("ppo.lam=high", "ppo.lam: input should be a valid number"),
        ("ppo.lam=1.5", "ppo.lam: input should be less than or equal to 1"),
        ("sft.batch_size=0", "sft.batch_size: input should be greater than or equal to 1"),
        ("train.tracker=mlflow", "train.tracker: input should be 'wandb', 'tensorboard' or 'none'"),
        ("train.seq_length=1000", "train.seq_length: 1000 is more than the model's 256 positions"),
        ("train.seq_length=48", "train.seq_length: 48 leaves no room for a prompt"),
        ("train.batch_size=7", "ppo.num_rollouts: 64 is not a multiple of train.batch_size = 7"),
        ("model.num_layers_unfrozen=5", "model.num_layers_unfrozen: 5 is more than the model's 4 layers"),
        ("model.num_layers_unfrozen=0", "model.num_layers_unfrozen: 0 leaves nothing to train"),
        ("model.num_layers_unfrozen=-2", "model.num_layers_unfrozen: input should be greater than or equal to -1"),
        ("model.embedded.num_heads=5", "model.embedded.hidden_size: 192 is not a multiple of"),
        ("serving.model_name=a/b", "serving.model_name: string should match pattern"),
        ("generate.stop_sequences=['']", "generate.stop_sequences: an empty stop sequence"),
        ("ppo.scale_reward=ref", "ppo.ref_std: is needed by"),
        ("ppo.target=true", "ppo.target: input should not be true or false"),
        ("sft.batch_size=yes", "sft.batch_size: input should not be true or false"),
        ("optimizer.betas=[true, 0.9]", "optimizer.betas: input should not be true or false"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1: input should be less than 1"),
        ("optimizer.lr=.inf", "optimizer.lr: input should be a finite number"),
        ("optimizer.lr=1e999", "optimizer.lr: input should be a finite number"),
        ("ppo.cliprange=nan", "ppo.cliprange: input should be a finite number"),
        ("train.num_processes=0", "train.num_processes: input should be greater than or equal to 1"),
        ("model.path=''", "model.path: string should have at least 1 character"),
        ("data.source=", "data.source: string should have at least 1 character"),
        ("data.subsets=['']", "data.subsets.0: string should have at least 1 character"),
        ("reward_model.checkpoint=", "reward_model.checkpoint: string should have at least 1 character"),
        ("cluster.stages={trian: {gpus: 1}}", "cluster.stages.trian: unknown stage (did you mean 'train'?); stages: "),
        ("cluster.stages={train: {gpu: 1}}", "cluster.stages.train.gpu: unknown key (did you mean 'gpus'?)"),
        ("cluster.extra={mem: 1.5}", "cluster.extra.mem: input should be a valid string"),
        ("ppo.lam", "--set ppo.lam: expected key=value"),
        ("ppo.lam=[", "--set ppo.lam=[: the value is not valid YAML"),
    ],
)
def test_a_fault_is_one_line_that_names_key_and_remedy(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        demo(override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ppo.advantage=rloo"], 'ppo.group_size: 1 gives ppo.advantage = "rloo" no other answer to compare with'),
        (["ppo.group_size=3"], "ppo.num_rollouts: 64 is not a multiple of ppo.group_size = 3"),
        (["ppo.advantage=grpo", "ppo.group_size=4", "ppo.critic=model"], 'ppo.critic: "model" is of no use'),
        (
            ["ppo.advantage=rloo", "ppo.group_size=4", "ppo.critic_warmup_steps=2"],
            "ppo.critic_warmup_steps: means nothing",
        ),
        (["train.method=ilql", "model.lora.rank=4"], "model.lora.rank: adapters are PPO's"),
        (["sft.save_best=true"], "sft.save_best: needs evaluations to choose from; set sft.eval_interval"),
        (["reward_model.save_best=true"], "reward_model.save_best: needs evaluations to choose from; set reward_m"),
        (["ppo.critic_lr=1e-5"], "ppo.critic_lr: a value head is trained at optimizer.lr"),
        (["ppo.kl_placement=loss"], 'ppo.kl_estimator: the gradient of "k1" is zero on average'),
        (["train.method=ilql", "ilql.betas=[]"], "ilql.betas: is empty"),
        (["train.method=ilql", "ilql.betas=[1,1.0]"], "ilql.betas: [1.0, 1.0] holds a beta twice"),
        (["train.method=ilql", "ilql.best_beta=2"], "ilql.best_beta: 2.0 is not among ilql.betas = [1.0, 4.0]"),
        (["train.method=ilql", "ilql.reward_chosen=-1"], "ilql.reward_chosen: -1.0 is not above"),
    ],
)
def test_settings_that_exclude_each_other_are_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        demo(*overrides)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "stage", "message"),
    [
        ("ppo.advantage=rloo", "train", 'ppo.group_size: 1 gives ppo.advantage = "rloo"'),
        ("model.num_layers_unfrozen=9", "train", "model.num_layers_unfrozen: 9 is more than the model's 4 layers"),
        ("train.seq_length=1000", "evaluate", "train.seq_length: 1000 is more than the model's 256 positions"),
        ("generate.max_new_tokens=200", "evaluate", "train.seq_length: 160 leaves no room for a prompt"),
        ("reward_model.max_length=999", "reward-model", "reward_model.max_length: 999 is more than"),
        ("reward_model.accelerate_config=zero2-bf16", "reward-model", "reward_model.accelerate_config: zero2-bf16"),
        ("reward_model.save_best=true", "reward-model", "reward_model.save_best: needs evaluations"),
        ("serving.max_length=999", "convert", "serving.max_length: 999 is more than the model's 256 positions"),
    ],
)
def test_what_only_some_stages_read_is_checked_where_these_run(override: str, stage: str, message: str) -> None:
    config = demo("all=[prefetch, sft]", override)
    check_selected(config, ["sft"])
    for fault in (lambda: check_selected(config, [stage]), lambda: demo(f"all=[prefetch, {stage}]", override)):
        with pytest.raises(UserError) as caught:
            fault()
        assert str(caught.value).startswith(message)


def test_adapters_need_a_stage_that_trains_them(tmp_path: Path) -> None:
    check_selected(demo("all=[prefetch, sft]", "model.lora.rank=4"), ["train"])
    with pytest.raises(UserError, match=r"^model\.lora\.rank: adapters are PPO's, and the stage train is not among"):
        settings = ["--set", "model.lora.rank=4", "--set", "all=[prefetch, sft]"]
        submit.main(["--preset", "demo", "--run-dir", str(tmp_path / "run"), "--dry-run", *settings])


def test_only_the_method_that_trains_is_checked() -> None:
    assert demo("train.method=ilql", "train.batch_size=7", "ppo.advantage=rloo").train.batch_size == 7
    assert demo("ilql.betas=[]").ilql.betas == ()
    grouped = demo("ppo.advantage=grpo", "ppo.group_size=4", "ppo.kl_placement=loss", "ppo.kl_estimator=k3")
    assert grouped.ppo.group_size == 4
    assert demo("ppo.critic=model", "ppo.critic_lr=1e-5").ppo.critic_lr == 1e-5
    for layers in (-1, 1, 4):  # the demo's model has 4
        assert demo(f"model.num_layers_unfrozen={layers}").model.num_layers_unfrozen == layers


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--preset dmeo: unknown preset \(did you mean 'demo'\?\)"):
        load.load_preset("dmeo")
    with pytest.raises(UserError, match=r"--cluster locla: .*did you mean 'local'"):
        demo(cluster="locla")


def test_a_cluster_file_replaces_the_profile_and_is_checked(tmp_path: Path) -> None:
    profile = tmp_path / "site.yaml"
    profile.write_text("name: site\nexecutor: slurm\npartition: gpu\nstages: {train: {gpus: 8}}\n")
    config = demo(cluster=str(profile))
    assert config.cluster.resources("train").gpus == 8
    assert config.cluster.resources("sft").gpus == 0
    profile.write_text("partitoin: gpu\n")
    with pytest.raises(UserError, match=r"cluster.partitoin: unknown key \(did you mean 'partition'\?\)"):
        demo(cluster=str(profile))


def test_files_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    missing, scalar, broken = tmp_path / "no.yaml", tmp_path / "scalar.yaml", tmp_path / "broken.yaml"
    scalar.write_text("5")
    broken.write_text("a: [")
    for path, message in ((missing, "no such file"), (scalar, "expected a mapping"), (broken, "not valid YAML")):
        with pytest.raises(UserError, match=message) as caught:
            load.load_yaml(path)
        assert str(path) in str(caught.value)


def model_folder(folder: Path, **sizes: object) -> Path:
    """A folder that looks like a model as far as its config.json goes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(sizes))
    return folder


@pytest.mark.parametrize(
    "sizes", [{"num_hidden_layers": 3, "max_position_embeddings": 128}, {"n_layer": 3, "n_positions": 128}]
)
def test_a_model_folders_own_sizes_are_checked(tmp_path: Path, sizes: dict[str, int]) -> None:
    path = model_folder(tmp_path / "model", **sizes)
    fitting = [f"model.path={path}", "train.seq_length=128", "sft.max_length=128"]
    fitting += ["reward_model.max_length=128", "serving.max_length=128"]
    assert demo(*fitting).model.num_layers_unfrozen == 2

    for override, message in [
        ("model.num_layers_unfrozen=4", f"num_layers_unfrozen: 4 is more than the model's 3 layers ({path}"),
        ("train.seq_length=129", f"train.seq_length: 129 is more than the model's 128 positions ({path}"),
        ("sft.max_length=129", "sft.max_length: 129 is more than"),
        ("serving.max_length=129", "serving.max_length: 129 is more than"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            demo(*fitting, override)


def test_a_reward_model_of_ones_own_has_its_own_length(tmp_path: Path) -> None:
    checkpoint = model_folder(tmp_path / "rm", num_hidden_layers=2, max_position_embeddings=512)
    given = f"reward_model.checkpoint={checkpoint}"
    assert demo(given, "serving.max_length=512").serving.max_length == 512  # twice the policy's 256 positions
    with pytest.raises(UserError, match=r"serving\.max_length: 513 is more than the model's 512 positions"):
        demo(given, "serving.max_length=513")


def test_a_damaged_config_json_is_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    for text in ("{", "[]"):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"^model\.path: .*config\.json: [^\n]*restore it"):
            demo(f"model.path={folder}")


def test_paths_mean_the_same_wherever_the_configuration_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("hh", "demo", "embedded", "ddp", "models/tok", "models/rm", "home/mine"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "site.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    config = demo(
        *("data.source=./hh", "model.path=~/mine", "model.tokenizer_path=models/tok"),
        *("reward_model.checkpoint=models/rm", "train.accelerate_config=site.yaml", "sandbox.cache_dir=new"),
    )

    assert config.data.source == f"{tmp_path}/hh"
    assert config.model.path == f"{tmp_path}/home/mine"
    assert config.model.tokenizer_path == f"{tmp_path}/models/tok"
    assert config.reward_model.checkpoint == f"{tmp_path}/models/rm"
    assert config.train.accelerate_config == f"{tmp_path}/site.yaml"
    assert config.sandbox.cache_dir == f"{tmp_path}/new"  # will be made

    names = demo("data.source=hh", "reward_model.checkpoint=some/model", "train.accelerate_config=ddp")
    assert (names.data.source, names.model.path) == ("hh", "embedded")  # though folders are called so
    assert (names.reward_model.checkpoint, names.train.accelerate_config) == ("some/model", "ddp")


def test_every_setting_is_explained() -> None:
    rows = [line for line in render_reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 80
    assert [row for row in rows if row.endswith("|  |")] == []


def test_a_setting_of_the_cluster_is_laid_over_its_profile() -> None:
    asked = ["cluster.requeue=false", "cluster.grace_s=900"]
    config = load.resolve(load.load_preset("gptj"), asked, "single-node-8gpu")
    assert (config.cluster.requeue, config.cluster.grace_s) == (False, 900)
    assert config.cluster.executor == "slurm"  # the profile's
    with pytest.raises(UserError, match=r"^cluster.bogus: unknown key"):
        load.resolve(load.load_preset("gptj"), ["cluster.bogus=1"], "single-node-8gpu")
