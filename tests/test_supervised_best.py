"""`save_best`: the model of the lowest held-out loss is kept, through any interruption, and is what goes on."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from helpers_supervised import TREE, configure, own_process_state, prefetched, run, same_weights, work

from pipeline.config.load import resolve
from pipeline.errors import UserError
from pipeline.run.directory import Artifact, Outputs, RunDir
from pipeline.run.sources import compared_paths, policy_start_path, reward_model_path
from pipeline.stages.base import digest
from pipeline.stages.execute import link_artifacts
from pipeline.training import fit
from pipeline.training.best import Best
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.checkpoint_files import all_checkpoints, rotate
from pipeline.training.metrics import read_rows

__all__ = ["own_process_state", "prefetched", "run"]  # fixtures of the tests here

TOO_FAST = {"save_best": True, "eval_interval": 2, "checkpoint_interval": 4, "max_steps": 8, "scheduler": "constant"}
RATE = 0.3
"""So high that the loss falls and then rises again: SFT's after step 6, the reward model's after step 2."""


def result(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "result.json").read_text()))


def of_best(out: Path, where: Path) -> Path:
    """The best model of a result, as if it were all of another one."""
    shutil.copytree(out / result(out)["artifacts"]["best"], where / "model")
    return where


@pytest.mark.parametrize("method", ["sft", "reward_model"])
def test_the_best_is_the_model_of_a_training_that_ends_there_whatever_interrupts(
    method: str, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**TOO_FAST, "lr": RATE}
    configure(run.root, **{method: settings})
    assert work(run, method, "whole")[0] == 0
    (metrics,) = run.checkpoints.glob("*/metrics.jsonl")
    losses = {row["step"]: row["test/loss"] for row in read_rows(metrics) if "test/loss" in row}
    best_step = min(losses, key=losses.__getitem__)
    assert best_step not in (0, 8), losses
    whole = result(run.root / "whole")
    assert whole["artifacts"] == {"model": "model", "best": "best"}
    assert whole["values"]["loss"] == whole["values"]["best_loss"] == losses[best_step]  # of what goes on
    assert whole["values"]["best_step"] == best_step and whole["values"]["last_loss"] == losses[8]
    best = of_best(run.root / "whole", tmp_path / "best")
    card = (best / "model" / "README.md").read_text()
    assert f"- loss: {losses[best_step]:.5g}\n" in card and f"- best_step: {best_step}\n" in card
    assert f"- loss: {losses[8]:.5g}\n" in (run.root / "whole" / "model" / "README.md").read_text()

    shutil.rmtree(run.checkpoints)
    real, step = fit.backward, 0

    def disturbed(*arguments: Any) -> Any:
        nonlocal step
        step += 1
        if step == 7:
            raise KeyboardInterrupt  # step 7 is under way, step 4 is saved: what was best at step 6 is found again
        if step == 7 + 3:
            os.kill(os.getpid(), signal.SIGTERM)  # in step 4 + 3
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(fit, "backward", disturbed)
        with pytest.raises(KeyboardInterrupt):
            work(run, method, "killed")
        assert work(run, method, "stopped")[0] == 75
    assert work(run, method, "finished")[0] == 0
    assert same_weights(run.root / "finished", run.root / "whole")
    assert same_weights(of_best(run.root / "finished", tmp_path / "again"), best)
    assert result(run.root / "finished")["values"]["best_step"] == best_step

    configure(run.root, **{method: {**settings, "max_steps": best_step}})
    assert work(run, method, "short")[0] == 0
    assert result(run.root / "short")["artifacts"] == {"model": "model", "best": "model"}  # its last is its best
    assert same_weights(run.root / "short", best) and not (run.root / "short" / "best").exists()


def test_a_loss_that_is_no_number_is_not_the_best_for_ever() -> None:
    kept = list[int]()
    checkpoints = SimpleNamespace(save_best=lambda accelerator, step, figure: kept.append(step))
    best = Best(cast(Any, None), cast(Any, checkpoints), keep=True, total_steps=9)
    for step, loss in enumerate((math.nan, 2.0, 2.0, math.nan, 1.0)):
        best.consider(step, {"loss": loss})
    assert best.step == 4 and kept == [0, 1, 4]


def test_best_weights_that_are_gone_are_an_error(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(run.root, sft={**TOO_FAST, "lr": RATE})
    real = Checkpoints.load_best

    def load_best(checkpoints: Checkpoints, *arguments: Any) -> bool:
        checkpoints.wait()
        (checkpoints.folder / "best" / "model.safetensors").unlink()
        return real(checkpoints, *arguments)

    monkeypatch.setattr(Checkpoints, "load_best", load_best)
    with pytest.raises(
        UserError, match=r"the weights of step \d+, the best, are damaged or gone; remove the folder to train again$"
    ):
        work(run, "sft", "out")
    assert not (run.root / "out" / "result.json").exists()


def test_no_rotation_removes_a_best_that_a_checkpoint_knows_of(tmp_path: Path) -> None:
    for step, best_step in ((4, 2), (8, 6)):
        (tmp_path / f"step-{step:08d}").mkdir()
        state = {"step": step, "extra": {"best_step": best_step, "figures": {"loss": 1.0}}}
        (tmp_path / f"step-{step:08d}" / "state.json").write_text(json.dumps(state))
    for step in (0, 2, 4, 6):
        (tmp_path / f"best-{step:08d}").mkdir()
    newest = tmp_path / "step-00000008"
    rotate(tmp_path, newest, keep=2)
    assert [path.name[-1] for path in all_checkpoints(tmp_path, "best-")] == ["2", "6"]
    rotate(tmp_path, newest, keep=1)
    assert [path.name[-1] for path in all_checkpoints(tmp_path, "best-")] == ["6"]


def finished(run: RunDir, stage: str, *names: str) -> Outputs:
    for name in names:
        (run.root / stage / name).mkdir(parents=True, exist_ok=True)
    made = Outputs(stage, "f", 1, {name: Artifact(f"{stage}/{name}", f"sha of {name}", 0) for name in names})
    run.write_outputs(made)
    return made


def test_what_follows_takes_the_best_where_there_is_one(tmp_path: Path) -> None:
    run, config = RunDir(tmp_path), resolve(TREE)
    only_sft = resolve({**TREE, "all": ["prefetch", "sft", "evaluate"]})
    base = finished(run, "prefetch", "model")
    assert base.artifacts.keys() == {"model"}
    for names, taken in ((("model",), "model"), (("model", "best"), "best")):
        for stage in ("sft", "reward-model"):
            link_artifacts(run, stage, finished(run, stage, *names).artifacts)
            assert (tmp_path / "models" / stage).resolve() == tmp_path / stage / taken
        assert policy_start_path(run, config) == tmp_path / "sft" / taken
        assert reward_model_path(run, config) == tmp_path / "reward-model" / taken
        assert compared_paths(run, only_sft) == (tmp_path / "prefetch" / "model", tmp_path / "sft" / taken)


def test_another_best_makes_what_follows_run_again() -> None:
    made = {name: Artifact(name, f"sha of {name}", 0) for name in ("model", "best")}
    before = Outputs("sft", "f", 1, made)
    after = replace(before, artifacts={**made, "best": Artifact("best", "another", 0)})
    assert digest(before) != digest(after)  # which is in the fingerprint of the stages that read it
