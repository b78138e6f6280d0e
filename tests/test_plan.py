"""The plan runs exactly what is needed, and says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config import load
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run.directory import Artifact, Outputs, RunDir
from pipeline.run.hashing import HashCache, fingerprint, hash_tree
from pipeline.scheduler.submit import group_jobs
from pipeline.stages.base import Context
from pipeline.stages.names import STAGES, select_stages
from pipeline.stages.plan import basis, make_plan
from pipeline.stages.registry import REGISTRY


def context_for(tmp_path: Path, *overrides: str) -> Context:
    config = load.resolve(load.load_preset("demo"), overrides)
    return Context(RunDir(tmp_path), config, HashCache(tmp_path / "hashes.json"))


def finish(context: Context, *stages: str, content: str = "") -> None:
    """Do what a job does when a stage ends well: write an artifact, then outputs.json."""
    for name in stages:
        if name == "serve":
            continue
        known = basis(REGISTRY[name], context)
        path = context.run.attempt(name, 1) / "out" / "artifact"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content or json.dumps(known))
        sha256, size = hash_tree(path)
        artifacts = {"model": Artifact(str(path.relative_to(context.run.root)), sha256, size)}
        context.run.write_outputs(Outputs(name, fingerprint(known), 1, artifacts, {}, known))


def actions(context: Context, stages=STAGES, force: bool = False, environ=None) -> dict[str, str]:
    return {each.stage: each.action for each in make_plan(context, stages, stages if force else (), environ or {})}


def reasons(context: Context, stages=STAGES, environ=None) -> dict[str, str]:
    return {each.stage: each.reason for each in make_plan(context, stages, (), environ or {})}


def test_a_new_run_runs_everything(tmp_path: Path) -> None:
    plan = actions(context_for(tmp_path))
    assert list(plan) == list(STAGES)
    assert set(plan.values()) == {"run"}


def test_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    context = context_for(tmp_path)
    finish(context, *STAGES)
    assert set(actions(context).values()) == {"skip"}
    assert reasons(context)["serve"] == "not needed: train is up to date"


@pytest.mark.parametrize("override", ["serving.dtype=bfloat16", "serving.max_length=200"])
def test_without_a_store_the_judges_settings_are_those_of_who_asks_it(tmp_path: Path, override: str) -> None:
    own = "all=[prefetch,sft,reward-model,train,evaluate]"
    stages = ("prefetch", "sft", "reward-model", "train", "evaluate")
    finish(context_for(tmp_path, own), *stages)
    changed = context_for(tmp_path, own, override)
    for stage in ("train", "evaluate"):  # the second is looked at once the first is done
        plan = actions(changed, stages)
        assert [name for name, action in plan.items() if action == "run"] == [stage]
        finish(changed, stage)


@pytest.mark.parametrize(
    ("override", "runs", "checks"),
    [
        ("evaluate.num_prompts=50", {"evaluate"}, set()),
        ("ppo.lam=0.5", {"train"}, {"serve", "evaluate"}),
        ("serving.max_batch_size=8", {"convert"}, {"train", "serve", "evaluate"}),
        ("reward_model.lr=0.5", {"reward-model"}, {"convert", "train", "serve", "evaluate"}),
        ("data.demo.train=2000", {"prefetch"}, set(STAGES) - {"prefetch", "sandbox"}),
        ("train.tracker=none", set(), set()),
        ("train.micro_batch_tokens=512", set(), set()),
        ("sft.micro_batch_tokens=512", set(), set()),
        ("serving.dtype=bfloat16", {"convert"}, {"train", "serve", "evaluate"}),
        ("cluster.partition=gpu", set(), set()),
    ],
)
def test_a_changed_setting_reruns_its_stage_and_what_depends_on_it(
    tmp_path: Path, override: str, runs: set[str], checks: set[str]
) -> None:
    finish(context_for(tmp_path), *STAGES)
    plan = actions(context_for(tmp_path, override))
    assert {stage for stage, action in plan.items() if action == "run"} - {"serve"} == runs
    assert {stage for stage, action in plan.items() if action != "skip"} == runs | checks | (
        {"serve"} if "train" in runs | checks else set()
    )


def test_the_reason_names_the_setting_and_both_values(tmp_path: Path) -> None:
    finish(context_for(tmp_path), *STAGES)
    why = reasons(context_for(tmp_path, "ppo.lam=0.5"))
    assert why["train"] == "config changed: ppo.lam: 0.95 to 0.5"
    assert why["evaluate"] == "waits for train: runs if that changes its input"


def test_an_input_that_comes_out_the_same_reruns_nothing_below_it(tmp_path: Path) -> None:
    context = context_for(tmp_path)
    finish(context, *STAGES, content="same weights")
    changed = context_for(tmp_path, "sft.batch_size=16")
    finish(changed, "sft", content="same weights")  # sft ran again and made what it had made
    assert set(actions(changed).values()) == {"skip"}
    finish(changed, "sft", content="other weights")
    assert reasons(changed)["reward-model"] == "input changed: sft"


def test_a_lost_or_cut_artifact_reruns_its_stage(tmp_path: Path) -> None:
    context = context_for(tmp_path)
    finish(context, *STAGES)
    artifact = context.run.artifact("train", "model")
    artifact.write_text("cut")
    assert "its artifact model has 3 bytes" in reasons(context)["train"]
    artifact.unlink()
    assert "its artifact model is gone" in reasons(context)["train"]


def test_a_raised_stage_version_reruns_it(tmp_path: Path, monkeypatch) -> None:
    context = context_for(tmp_path)
    finish(context, *STAGES)
    before = REGISTRY["convert"].version
    monkeypatch.setattr(type(REGISTRY["convert"]), "version", before + 1)
    assert reasons(context)["convert"] == f"the stage's version changed: {before} to {before + 1}"


def test_changed_rows_of_a_data_folder_rerun_prefetch(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("{}\n")
    context = context_for(tmp_path / "run", f"data.source={data}")
    finish(context, *STAGES)
    (data / "train.jsonl").write_text("{}\n{}\n")
    again = context_for(tmp_path / "run", f"data.source={data}")
    assert reasons(again)["prefetch"].startswith("config changed: data.train_sha256")


def test_a_single_stage_needs_its_inputs(tmp_path: Path) -> None:
    context = context_for(tmp_path)
    with pytest.raises(UserError, match=r"--stage convert: needs reward-model, which is not done .*; add it"):
        make_plan(context, ["convert"], (), {})
    finish(context, "prefetch", "sft", "reward-model")
    assert actions(context, ["convert"]) == {"convert": "run"}


def test_force_reruns_what_is_up_to_date(tmp_path: Path) -> None:
    context = context_for(tmp_path)
    finish(context, *STAGES)
    assert actions(context, ["sft"], force=True) == {"sft": "run"}


def test_an_external_server_makes_ours_unnecessary(tmp_path: Path) -> None:
    environ = {"TRITON_HOST": "gpu7:8001/gptj-rm-static"}
    assert reasons(context_for(tmp_path), environ=environ)["serve"] == (
        "not needed: TRITON_HOST is set (gpu7:8001/gptj-rm-static)"
    )


def test_server_and_training_share_a_job_and_the_others_wait_for_their_inputs(tmp_path: Path) -> None:
    context = context_for(tmp_path)
    jobs = {job.name: job.waits_for for job in group_jobs(context.config, make_plan(context, STAGES, (), {}))}
    assert list(jobs) == ["prefetch", "sft", "reward-model", "sandbox", "convert", "serve+train", "evaluate"]
    assert jobs["sandbox"] == ()
    assert jobs["reward-model"] == ("prefetch", "sft")
    assert jobs["serve+train"] == ("prefetch", "sft", "sandbox", "convert")
    assert "train" in jobs["evaluate"]


def test_stage_selection() -> None:
    assert select_stages("all", STAGES) == STAGES
    assert select_stages("train,sft", STAGES) == ("sft", "train")
    assert select_stages("all", STAGES, start="convert", until="train") == ("convert", "serve", "train")
    assert select_stages("all", ("convert", "train")) == ("convert", "train")
    with pytest.raises(UserError, match=r"--stage evalute: unknown stage \(did you mean 'evaluate'\?\)"):
        select_stages("evalute", STAGES)
    with pytest.raises(UserError, match="--from train: leaves no stage of --stage sft"):
        select_stages("sft", STAGES, start="train")


def test_every_stage_is_registered() -> None:
    assert tuple(REGISTRY) == STAGES
    assert all(set(stage.needs(Config())) <= set(STAGES) for stage in REGISTRY.values())
