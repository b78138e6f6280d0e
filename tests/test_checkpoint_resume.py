"""A training that is killed, or asked to stop, ends in the weights of one that never was: bit for bit, on two ranks."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers_ppo import make_run, tiny_config, tokenizer
from safetensors.torch import load_file

from pipeline import procs
from pipeline.data.tokens import encode
from pipeline.resources import resource_dir
from pipeline.run.directory import RunDir

CONFIG = tiny_config()


def launch(run: RunDir, out: Path) -> procs.subprocess.Popen[bytes]:
    out.mkdir(parents=True, exist_ok=True)
    argv = [
        *(sys.executable, "-m", "pipeline.training.launch"),
        *("--config_file", str(resource_dir("accelerate") / "ddp-cpu.yaml"), "--num_processes", "2"),
        *("-m", "pipeline.training.ppo", "--run", str(run.root), "--out", str(out)),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (out / "log").open("wb") as log:
        return procs.spawn(argv, env=env, output=log)


def finish(process: procs.subprocess.Popen[bytes], out: Path) -> None:
    assert process.wait(120) == 0, (out / "log").read_text()


def wait_for_step(run: RunDir, step: int, process: procs.subprocess.Popen[bytes], out: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if run.metrics.exists() and f'"step": {step},' in run.metrics.read_text():
            return
        assert process.poll() is None, (out / "log").read_text()
        time.sleep(0.005)
    raise AssertionError("no such step in time")


def rewards(run: RunDir) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [(row["step"], row.get("reward/mean", row.get("rollout_scores/mean"))) for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunDir, Path]]:
    run = make_run(tmp_path_factory.mktemp("uninterrupted"), CONFIG)
    out = run.root / "out"
    finish(launch(run, out), out)
    yield run, out


def assert_same_end(run: RunDir, out: Path, other: tuple[RunDir, Path]) -> None:
    ours, theirs = (load_file(folder / "policy/model.safetensors") for folder in (out, other[1]))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert rewards(run) == rewards(other[0])


def test_killed_then_stopped_then_finished(uninterrupted: tuple[RunDir, Path], tmp_path: Path) -> None:
    run = make_run(tmp_path, CONFIG)
    killed, stopped, finished = (tmp_path / name for name in ("killed", "stopped", "finished"))
    process = launch(run, killed)
    wait_for_step(run, 2, process, killed)
    for pid in procs.session_pids(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()

    process = launch(run, stopped)
    wait_for_step(run, 4, process, stopped)
    run.stop_flag.parent.mkdir(parents=True)
    run.stop_flag.touch()
    assert process.wait(60) == 75, (stopped / "log").read_text()
    assert not (stopped / "result.json").exists() and (stopped / "stopped.json").exists()
    run.stop_flag.unlink()

    finish(launch(run, finished), finished)
    assert "resumed from" in (finished / "log").read_text()
    assert_same_end(run, finished, uninterrupted)


def test_the_policy_is_an_ordinary_model(uninterrupted: tuple[RunDir, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, out = uninterrupted
    values = json.loads((out / "result.json").read_text())["values"]
    assert values["steps"] == 8 and values["rollouts"] == 4 * 2 * 4
    model = AutoModelForCausalLM.from_pretrained(out / "policy")
    start = AutoModelForCausalLM.from_pretrained(run.artifact("sft", "model"))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start.state_dict()[name])}
    assert moved and all("layers.2" in name or "final_layer_norm" in name or "lm_head" in name for name in moved)
    text = "\n\nHuman: Hello\n\nAssistant:"
    assert encode(AutoTokenizer.from_pretrained(out / "policy"), text) == encode(tokenizer(), text)


def test_the_first_minibatch_of_every_phase_finds_nothing_changed(uninterrupted: tuple[RunDir, Path]) -> None:
    rows = [json.loads(line) for line in uninterrupted[0].metrics.read_text().splitlines()]
    phases = [row for row in rows if "phase" in row]
    assert len(phases) == 4
    assert all(row["ratio_first"] == 1.0 and row["policy/approx_kl_first"] == 0.0 for row in phases)
    assert phases[0]["policy/kl"] == 0.0 and phases[-1]["policy/kl"] > 0.0


def test_a_user_error_ends_all_ranks_with_status_2(tmp_path: Path) -> None:
    run = make_run(tmp_path, tiny_config(model={"path": "embedded", "num_layers_unfrozen": 4}))
    out = tmp_path / "out"
    process = launch(run, out)
    assert process.wait(60) == 2
    log = (out / "log").read_text()
    assert log.count("error: model.num_layers_unfrozen: 4 does not fit the model's 3 layers") == 1, (
        log
    )  # not once a rank
