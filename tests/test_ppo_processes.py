"""One process and two take the same optimiser steps, though their steps are cut into different numbers of forwards."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import ppo_rank
import pytest
import torch
from helpers_process import fresh_accelerate, own_process_state  # noqa: F401

from pipeline.procs import capture
from pipeline.resources import resource_dir

SCRIPT = Path(ppo_rank.__file__)
pytestmark = pytest.mark.usefixtures("own_process_state")


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_and_forwards_do_not_change_the_steps(tmp_path: Path, ranks: int) -> None:
    """Adam, a critic's warm-up and an entropy bonus included."""
    config = str(resource_dir("accelerate") / "ddp-cpu.yaml")
    launch = [sys.executable, "-m", "pipeline.training.launch", "--config_file", config, "--num_processes", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    status, said = capture([*launch, str(SCRIPT), str(tmp_path / "all")], env=environment, timeout_s=300)
    assert status == 0, said
    fresh_accelerate()
    ppo_rank.main(str(tmp_path / "alone"))

    alone, together = (torch.load(tmp_path / name, weights_only=True) for name in ("alone", "all"))
    assert alone["forwards"] != together["forwards"] and len(set(together["forwards"])) > 1
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(together["weights"][name], weight, atol=1e-5, rtol=1e-4)
    for kind in ("row", "figures"):
        numbers = alone[kind]
        assert {name: together[kind][name] for name in numbers} == pytest.approx(numbers, abs=1e-4)
