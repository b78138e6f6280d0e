"""A training that is interrupted between any two steps of a phase ends in the same bits, with the same record."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from helpers_ppo import make_run, tiny_config
from safetensors.torch import load_file

from pipeline.run.directory import RunDir
from pipeline.training import ppo
from pipeline.training.checkpoint_files import all_checkpoints, is_intact
from pipeline.training.updater import Updater

STEPS = 8
SETTINGS = {
    "num_processes": 1, "seq_length": 72, "batch_size": 4, "total_steps": STEPS, "eval_interval": 4, "eval_prompts": 4,
    "checkpoint_interval": 3, "keep_checkpoints": 9, "tracker": "none", "peak_tflops": 1.0,
}  # fmt: skip
CONFIG = tiny_config(train=SETTINGS, ppo={"num_rollouts": 8, "chunk_size": 4, "ppo_epochs": 2, "horizon": 100})


def train(run: RunDir, out: str) -> int:
    """A training in this process; its exit status."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        return ppo.main(["--run", str(run.root), "--out", str(run.root / out)])
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Have this process told to stop while it takes its `count`-th optimiser step from now."""
    original, taken = Updater._step, []

    def step(*arguments: Any) -> torch.Tensor:
        taken.append(None)
        if len(taken) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(Updater, "_step", step)


def folder_of(run: RunDir) -> Path:
    (folder,) = run.checkpoints.iterdir()
    return folder


def rows(run: RunDir) -> list[dict[str, Any]]:
    """What was recorded, but for what depends on the clock and the machine."""
    timed = ("time/", "reward_server/", "memory/", "tflops", "mfu", "tokens_per_second", "samples_per_second")
    lines = map(json.loads, run.metrics.read_text().splitlines())
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in lines]


def rollouts(run: RunDir) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder_of(run) / "rollouts").iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A training that nobody interrupted."""
    run = make_run(tmp_path_factory.mktemp("whole"), CONFIG)
    assert train(run, "out") == 0
    return run


def assert_same_end(run: RunDir, out: str, whole: RunDir) -> None:
    ours, theirs = (load_file(folder / "policy/model.safetensors") for folder in (run.root / out, whole.root / "out"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert rows(run) == rows(whole)
    assert rollouts(run) == rollouts(whole)
    samples = [(folder_of(each) / "samples.jsonl").read_text() for each in (run, whole)]
    assert samples[0] == samples[1]


def test_a_stop_takes_hold_at_the_next_step_and_changes_nothing(
    whole: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, CONFIG)
    for segment, (count, step) in enumerate([(1, 1), (2, 3), (1, 4), (3, 7)]):
        with monkeypatch.context() as patch:
            stop_after(patch, count)
            assert train(run, f"out{segment}") == 75
        newest = all_checkpoints(folder_of(run))[-1]
        assert newest.name == f"step-{step:08d}" and is_intact(newest)
        assert (newest / "phase_0.bin").exists() == (step % 4 > 0)
        assert json.loads((run.root / f"out{segment}/stopped.json").read_text())["step"] == step
    assert train(run, "last") == 0
    assert_same_end(run, "last", whole)


def test_a_checkpoint_falls_on_its_interval_and_a_kill_goes_back_to_it(whole: RunDir, tmp_path: Path) -> None:
    assert [path.name for path in all_checkpoints(folder_of(whole))] == [f"step-{step:08d}" for step in (3, 6, 8)]
    run = RunDir(tmp_path / "run")
    shutil.copytree(whole.root, run.root, symlinks=True)
    for path in all_checkpoints(folder_of(run))[1:]:
        shutil.rmtree(path)
    assert train(run, "again") == 0
    assert_same_end(run, "again", whole)


def test_rollouts_are_written_once_with_text_reward_and_kl(whole: RunDir) -> None:
    found = [json.loads(line) for text in rollouts(whole).values() for line in text.splitlines()]
    phases = [row for row in rows(whole) if "phase" in row]
    assert len(found) == 2 * 8 and {row["phase"] for row in found} == {0, 1}
    for phase in phases:
        mine = [row for row in found if row["phase"] == phase["phase"]]
        assert sum(row["reward"] for row in mine) / 8 == pytest.approx(phase["rollout_scores/mean"])
        assert sum(row["kl"] for row in mine) / 8 == pytest.approx(phase["policy/kl"], abs=1e-6)
        assert sum(row["tokens"] for row in mine) == phase["tokens/response"]
        assert all(row["prompt"].endswith("Assistant:") and isinstance(row["text"], str) for row in mine)


def test_a_phase_says_how_fast_it_was(whole: RunDir) -> None:
    (row, *_) = [row for row in map(json.loads, whole.metrics.read_text().splitlines()) if "phase" in row]
    assert row["mfu"] == pytest.approx(row["tflops"]) and 0.0 < row["mfu"] < 1.0  # the peak was given as 1 TFLOP/s
    assert row["samples_per_second"] == pytest.approx(8 / row["time/phase"])
    assert row["time/reward_wait_share"] == row["time/reward_wait"] / row["time/phase"]
    assert row["memory/peak_rss_gib"] > 0.05


def test_the_best_policy_is_kept_beside_the_last(whole: RunDir) -> None:
    result = json.loads((whole.root / "out/result.json").read_text())
    evaluations = {row["step"]: row["reward/mean"] for row in rows(whole) if "reward/mean" in row}
    best = max(evaluations, key=lambda step: (evaluations[step], -step))
    assert result["values"]["best_step"] == best
    assert (folder_of(whole) / "best").resolve().name == f"best-{best:08d}"
    if best == STEPS:
        assert result["artifacts"] == {"policy": "policy", "best": "policy"}
    else:
        assert result["artifacts"] == {"policy": "policy", "best": "best"}
        kept = load_file(folder_of(whole) / "best/model.safetensors")
        saved = load_file(whole.root / "out/best/model.safetensors")
        name = "top.head.weight"
        assert torch.equal(kept[name], saved["embed_out.weight"])
