"""One process and two take the same optimiser steps, though their steps are cut into different numbers of forwards."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.procs import capture
from pipeline.resources import resource_dir

SCRIPT = Path(__file__).with_name("ppo_rank.py")


def ran(out: Path, *launcher: str) -> dict[str, Any]:
    """What a training of the whole phase ends in."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    status, said = capture([sys.executable, *launcher, str(SCRIPT), str(out)], env=environment, timeout_s=240)
    assert status == 0, said
    result: dict[str, Any] = torch.load(out, weights_only=True)
    return result


def test_ranks_and_forwards_do_not_change_the_steps(tmp_path: Path) -> None:
    config = str(resource_dir("accelerate") / "ddp-cpu.yaml")
    launcher = ["-m", "pipeline.training.launch", "--config_file", config, "--num_processes", "2"]
    alone, both = ran(tmp_path / "alone"), ran(tmp_path / "both", *launcher)
    assert alone["forwards"] != both["forwards"] and len(set(both["forwards"])) > 1
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(both["weights"][name], weight, atol=1e-5, rtol=1e-4)
    for kind in ("row", "figures"):
        numbers = {name: value for name, value in alone[kind].items() if name != "padding_percentage"}
        assert {name: both[kind][name] for name in numbers} == pytest.approx(numbers, abs=1e-4)
