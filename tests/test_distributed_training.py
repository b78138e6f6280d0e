"""One process, several, ZeRO-2 and ZeRO-3: the same training, to the rounding of sums."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_ppo import make_run, tiny_config
from helpers_process import own_process_state  # noqa: F401
from ranks_training import one
from safetensors.torch import load_file

from pipeline.procs import capture
from pipeline.resources import resource_dir
from pipeline.run.directory import RunDir

SCRIPT = str(Path(__file__).with_name("ranks_training.py"))


def launched(run: RunDir, config: str, processes: int) -> dict[str, Any]:
    out = run.root / "results.json"
    argv = [
        *(sys.executable, "-m", "pipeline.training.launch", "--config_file", str(resource_dir("accelerate") / config)),
        *("--num_processes", str(processes), "--mixed_precision", "no", SCRIPT, str(run.root), str(out)),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    status, said = capture(argv, env=env, timeout_s=300)
    assert status == 0, said
    results: dict[str, Any] = json.loads(out.read_text())
    return results


def assert_same(mode: str, got: dict[str, Any], expected: dict[str, Any]) -> None:
    for phase, other in zip(got["curve"], expected["curve"], strict=True):
        assert phase == pytest.approx(other, rel=2e-4, abs=2e-6), mode
    assert got["again"] == pytest.approx(got["curve"][2], rel=1e-5, abs=1e-7)  # from the checkpoint
    assert got["sampled"] == expected["sampled"]
    weights, others = (load_file(Path(result["folder"]) / "model.safetensors") for result in (got, expected))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("own_process_state")
def test_ranks_and_zero_stages_do_not_change_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The top layers with a critic of its own, in float32, so that nothing but the order of sums may differ."""
    base = tiny_config()
    config = tiny_config(ppo={**base.ppo.model_dump(), "critic": "model", "critic_lr": 5e-4, "ppo_epochs": 1})
    run = make_run(tmp_path, config)
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        monkeypatch.setenv(name, "")
    alone = one("ddp0", run)
    two = launched(run, "zero3.yaml", 2)
    assert list(two) == ["zero3", "zero2", "ddp0"]
    assert two["zero3"]["weights"] == 0  # nothing is whole outside of a forward
    for mode, result in two.items():
        assert_same(mode, result, alone)
