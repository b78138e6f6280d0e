"""A checkpoint is whole or absent, and what was recorded beyond it is recorded again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from pipeline.errors import UserError
from pipeline.training.checkpoint import Checkpoints, all_checkpoints, is_intact
from pipeline.training.metrics import append_row, keep_rows_until, read_rows
from pipeline.training.prompts import all_prompts, phase_prompts
from pipeline.training.ranks import Ranks
from pipeline.training.state import TrainState, state_from

ALONE = Ranks(0, 1, torch.device("cpu"))


def accelerator_of(model: torch.nn.Module) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    return accelerator


def saved(folder: Path, steps: range, keep: int = 3) -> tuple[Checkpoints, Accelerator, torch.nn.Linear]:
    model = torch.nn.Linear(2, 1)
    accelerator = accelerator_of(model)
    checkpoints = Checkpoints(folder, ALONE, keep)
    for step in steps:
        torch.nn.init.constant_(model.weight, float(step))
        checkpoints.save(accelerator, step, {"phase": step // 2})
    return checkpoints, accelerator, model


def test_the_newest_is_loaded_and_old_ones_go(tmp_path: Path) -> None:
    checkpoints, accelerator, model = saved(tmp_path, range(2, 12, 2), keep=2)
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step-00000008", "step-00000010"]
    assert (tmp_path / "latest").resolve().name == "step-00000010"
    torch.nn.init.zeros_(model.weight)
    state = checkpoints.load(accelerator)
    assert state is not None and state["step"] == 10 and state["phase"] == 5
    assert model.weight.tolist() == [[10.0, 10.0]]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest", "state"])
def test_a_damaged_checkpoint_is_never_picked(tmp_path: Path, damage: str) -> None:
    checkpoints, accelerator, model = saved(tmp_path, range(2, 6, 2))
    newest = all_checkpoints(tmp_path)[-1]
    weights = newest / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "truncate":
        weights.write_bytes(data[:-3])
    elif damage == "flip":
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "remove":
        weights.unlink()
    elif damage == "manifest":
        (newest / "manifest.json").write_text('{"state.json": [')
    else:
        (newest / "state.json").unlink()
    assert not is_intact(newest)
    state = checkpoints.load(accelerator)
    assert state is not None and state["step"] == 2
    assert model.weight.tolist() == [[2.0, 2.0]]
    checkpoints.save(accelerator, 4, {})
    assert is_intact(newest)


def test_an_unfinished_checkpoint_is_swept_away(tmp_path: Path) -> None:
    checkpoints, accelerator, _ = saved(tmp_path, range(0))
    (tmp_path / "step-00000008.unfinished").mkdir()
    assert checkpoints.load(accelerator) is None
    assert list(tmp_path.iterdir()) == []


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    checkpoints, accelerator, _ = saved(tmp_path, range(2, 4, 2))
    path = all_checkpoints(tmp_path)[0]
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "processes": 7}))
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["state.json"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert not is_intact(path)
    from pipeline.run.hashing import sha256_file

    manifest["state.json"] = [(path / "state.json").stat().st_size, sha256_file(path / "state.json")]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"written by 7 processes, but there are 1; set train\.num_processes=7"):
        checkpoints.load(accelerator)


def test_state_survives_json() -> None:
    state = TrainState(kl_coefficient=0.1 + 0.2, step=7, phase=2, first_reward=1 / 3, best_reward=2 / 3)
    assert state_from(json.loads(json.dumps(state.plain()))) == state


def test_metrics_beyond_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (0, 4, 8):
        append_row(path, {"step": step, "loss": float("nan")})
    with path.open("a") as file:
        file.write('{"step": 12, "lo')
    keep_rows_until(path, 4)
    assert read_rows(path) == [{"step": 0, "loss": None}, {"step": 4, "loss": None}]


def test_an_epoch_visits_every_prompt_once_whatever_the_ranks() -> None:
    size, count = 12, 3
    for world in (1, 2, 4):
        phases = size // (count * world)
        places = [(phase, rank) for phase in range(phases) for rank in range(world)]
        seen = [row for phase, rank in places for row in phase_prompts(phase, rank, world, count, size, 5)]
        assert sorted(seen) == list(range(size))
    assert all_prompts(1, 2, count, size, 5) == sorted(seen[:6])
    second = [row for rank in range(4) for row in phase_prompts(1, rank, 4, count, size, 5)]
    assert sorted(second) == list(range(size)) and second != seen
