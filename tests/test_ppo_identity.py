"""Which training goes on from which checkpoints, and whose curves are shown."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers_ppo import finish_stage, make_run, tiny_config, tiny_model
from helpers_process import fresh_accelerate, own_process_state  # noqa: F401

from pipeline.config.load import dump
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import training_rows
from pipeline.run import atomic, sources
from pipeline.run.directory import Artifact, Outputs, RunDir
from pipeline.training import ppo, reward_model, sft
from pipeline.training.metrics import Row, append_row, read_rows

pytestmark = pytest.mark.usefixtures("own_process_state")


def short(**more: Any) -> Config:
    train = {**tiny_config().train.model_dump(), "num_processes": 1, "total_steps": 4, "checkpoint_interval": 2}
    return tiny_config(train={**train, **more.pop("train", {})}, **more)


def train(run: RunDir, config: Config, out: str) -> None:
    fresh_accelerate()
    atomic.write_text(run.config, dump(config))
    assert ppo.main(["--run", str(run.root), "--out", str(run.root / out)]) == 0


def shown(run: RunDir) -> list[Row]:
    """The rows at the top of the run, without times."""
    timed = ("time/", "tokens_per_second", "reward_server/")
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in read_rows(run.metrics)]


def test_by_hand_too_a_training_never_goes_on_from_another_ones_state(tmp_path: Path) -> None:
    """Trained with settings A, then B, then A again, with the checkpoints of all of them kept."""
    run = make_run(tmp_path, short())
    a, b = short(), short(ppo={"num_rollouts": 4, "chunk_size": 4, "ppo_epochs": 2, "init_kl_coef": 0.4})
    train(run, a, "first")
    first = shown(run)
    assert [row["step"] for row in first] == [0, 2, 4, 4]
    assert run.metrics.is_symlink() and not run.metrics.readlink().is_absolute()

    train(run, b, "second")
    assert [row["step"] for row in shown(run)] == [0, 2, 4, 4]
    assert shown(run)[1]["kl_ctl_value"] == 0.4
    assert len(list(run.checkpoints.iterdir())) == 2

    train(run, a, "third")
    assert shown(run) == first
    recorded = atomic.read_json(run.root / "first" / "result.json")["values"]["metrics"]
    assert run.metrics.resolve() == run.root / recorded


def test_by_hand_the_settings_and_files_that_enter_name_the_checkpoints(tmp_path: Path) -> None:
    config = short()
    run = make_run(tmp_path, config)
    start = sources.policy_start_path(run, config)

    def name(config: Config) -> str:
        return ppo.manual_fingerprint(run, config)

    same = name(config)
    assert same.startswith("manual-")
    assert name(short(evaluate={"num_prompts": 2}, train={"keep_checkpoints": 7}, description="another day")) == same
    assert name(short(seed=7)) != same and name(short(optimizer={"lr": 2e-3})) != same
    tiny_model(spread=2.0, seed=9).save_pretrained(start)
    assert name(config) != same


def test_the_report_draws_the_training_that_made_the_policy(tmp_path: Path) -> None:
    """Another training was begun since and not finished: the link at the top is its own."""
    run = RunDir(tmp_path)
    finished, begun = (run.checkpoints / name / "metrics.jsonl" for name in ("a", "b"))
    append_row(finished, {"step": 1})
    append_row(begun, {"step": 2})
    atomic.replace_symlink(run.metrics, begun)
    policy = {"policy": Artifact("policy", "0", 0)}
    run.write_outputs(Outputs("train", "a", 1, policy, {"metrics": str(finished.relative_to(run.root))}))
    assert training_rows(run) == [{"step": 1}]
    finish_stage(run, "train", "policy", tmp_path / "policy")  # recorded before the path was
    assert training_rows(run) == [{"step": 2}]


@pytest.mark.parametrize(
    ("main", "key"),
    [(sft.main, "sft.max_length"), (reward_model.main, "reward_model.max_length"), (ppo.main, "train.seq_length")],
    ids=["sft", "reward model", "ppo"],
)
def test_sequences_longer_than_the_models_positions_are_refused(main: Any, key: str, tmp_path: Path) -> None:
    """What the settings alone do not show, as with a model of the hub: here the folders hold 128 positions."""
    section, name = key.split(".")
    settings = {**tiny_config().plain()[section], name: 200}
    model = {**tiny_config().model.model_dump(), "embedded": {"max_positions": 256}}
    run = make_run(tmp_path, tiny_config(model=model, **{section: settings}))
    shutil.copytree(run.artifact("sft", "model"), run.root / "base")
    data = Artifact(str(run.artifact("prefetch", "data").relative_to(run.root)), "0", 0)
    run.write_outputs(Outputs("prefetch", "f", 1, {"data": data, "model": Artifact("base", "0", 0)}))
    with pytest.raises(UserError, match=rf"^{key}: 200 is more than the 128 positions of .*; give at most 128$"):
        main(["--run", str(run.root), "--out", str(run.root / "out")])
