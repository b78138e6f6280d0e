"""ILQL's best policy is there for as long as a checkpoint, and so a resume, knows of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers_ppo import tiny_config

from pipeline.training.ilql import best_folder, figures_of_best, remove_forgotten, take_best


def checkpoint(folder: Path, step: int, best_step: int) -> None:
    path = folder / f"step-{step:08d}"
    path.mkdir()
    (path / "state.json").write_text(json.dumps({"step": step, "extra": {"best_step": best_step}}))


def keep(folder: Path, step: int) -> None:
    """As an evaluation does that finds a better policy."""
    path = best_folder(folder, step)
    path.mkdir()
    (path / "config.json").write_text(str(step))
    remove_forgotten(folder)


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in folder.glob("best-policy-*"))


def test_the_best_policy_that_a_resume_needs_outlives_better_ones(tmp_path: Path) -> None:
    keep(tmp_path, 900)
    checkpoint(tmp_path, 1000, best_step=900)
    keep(tmp_path, 1100)
    keep(tmp_path, 1200)
    assert kept(tmp_path) == [900, 1100, 1200]  # killed here, the training goes on from 1000
    assert take_best(tmp_path, 900, tmp_path / "best")
    assert (tmp_path / "best/config.json").read_text() == "900"


def test_what_no_checkpoint_knows_of_is_removed(tmp_path: Path) -> None:
    for step in (100, 900, 1100, 1200):
        keep(tmp_path, step)
    checkpoint(tmp_path, 1000, best_step=900)
    checkpoint(tmp_path, 2000, best_step=1200)
    keep(tmp_path, 2100)
    assert kept(tmp_path) == [900, 1200, 2100]


def test_a_best_policy_that_is_gone_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not take_best(tmp_path, 900, tmp_path / "best")
    assert "the policy of step 900, the best, was not kept" in caplog.text and not (tmp_path / "best").exists()


def test_the_bests_card_has_its_own_figures() -> None:
    config = tiny_config(ilql={"betas": [0.0, 1.0], "best_beta": 1.0, "beta": 1.0})
    best = {"first_reward": 0.5, "last_reward": 1.0, "best_reward": 2.0, "best_step": 900}
    assert figures_of_best(best, config) == {
        "optimiser step": 900, "beta": 1.0, "held-out reward": 2.0, "held-out reward of the start": 0.5,
    }  # fmt: skip
