"""The shared loop around what its stages train: steps that fp16 leaves out, and which checkpoints are its own."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from helpers_supervised import DIALOGUES, make_run, own_process_state
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.run import atomic
from pipeline.run.hashing import sha256_file
from pipeline.run.work import Progress
from pipeline.training import checkpoint, supervised
from pipeline.training import fit as loop
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.checkpoint_files import MANIFEST, all_checkpoints
from pipeline.training.fit import Course, Fit, Hooks, Keeping, Loop
from pipeline.training.metrics import read_rows
from pipeline.training.ranks import Ranks
from pipeline.training.sft import Dialogue
from pipeline.training.task import Task

__all__ = ["own_process_state"]  # a fixture of every test here

ALONE = Ranks(0, 1, torch.device("cpu"))


class Line(nn.Module):
    """The sum of w * x: the gradient's norm is the mean x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, xs: Tensor) -> tuple[Tensor, Tensor]:
        loss = (self.w * xs).sum()
        return loss, loss.detach().double().reshape(1)


def train(folder: Path, hooks: Hooks) -> Fit:
    accelerator = Accelerator(cpu=True)
    module = Line()
    wrapped, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.0))
    task: Task[Dialogue] = Task(lambda rows: (torch.full((len(rows), 1), 3.0),), lambda _: 1)
    keeping = Keeping(Checkpoints(folder, ALONE, 1, background=True), cast(Any, False), Progress(folder, 4))
    course = Course(
        total_steps=4, batch_size=3, seed=0, rate=lambda step: 0.0, max_grad_norm=100.0, checkpoint_interval=2
    )
    return Loop(accelerator, ALONE, wrapped, optimizer, task, DIALOGUES, course, keeping, hooks).run()


def test_a_step_that_fp16_leaves_out_is_counted_and_calls_no_hook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflows = iter([False, True, False, True])
    monkeypatch.setattr(loop, "was_skipped", lambda accelerator, optimizer: next(overflows))
    taken: list[int] = []

    done = train(tmp_path, Hooks(after_step=taken.append))

    assert done.step == 4 and taken == [1, 3]
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["update/skipped"]) for row in rows] == [(1, 0), (4, 2)]
    assert [row["grad_norm"] for row in rows] == pytest.approx([3.0, 3.0])  # of the steps that were taken


def test_a_loss_scale_that_cannot_fall_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflowing(self: Accelerator, loss: Tensor) -> None:
        raise RuntimeError("Current loss scale already at minimum - cannot decrease scale anymore.")

    monkeypatch.setattr(Accelerator, "backward", overflowing)
    with pytest.raises(UserError, match="fp16 gradients overflow at the smallest loss scale"):
        train(tmp_path, Hooks())


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last_step, write = threading.Event(), checkpoint.write_part

    def slow(*arguments: Any) -> None:
        assert last_step.wait(60), "the loop waited for its first checkpoint"
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write_part", slow)
    assert train(tmp_path, Hooks(after_step=lambda step: last_step.set() if step == 4 else None)).complete
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step-00000004"]


def test_a_checkpoint_that_cannot_be_written_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise UserError("checkpoints: no space left on the disk; free some")

    monkeypatch.setattr(checkpoint, "write_part", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        train(tmp_path, Hooks())
    assert all_checkpoints(tmp_path) == []


def test_another_number_of_processes_is_refused_by_the_stages_own_setting(tmp_path: Path) -> None:
    train(tmp_path, Hooks())
    three = Checkpoints(tmp_path, ALONE, 1, processes="reward_model.num_processes")
    state = {**(atomic.read_json(tmp_path / "latest" / "state.json") or {}), "processes": 3}
    rewrite(tmp_path / "latest", state)
    with pytest.raises(UserError, match=r"written by 3 processes, but there are 1; set reward_model\.num_processes=3"):
        three.load(Accelerator(cpu=True))


def rewrite(folder: Path, state: dict[str, Any]) -> None:
    """Put another state into a checkpoint that stays intact."""
    path = folder / "state.json"
    atomic.write_json(path, state)
    names = {**(atomic.read_json(folder / MANIFEST) or {}), "state.json": [path.stat().st_size, sha256_file(path)]}
    atomic.write_json(folder / MANIFEST, names)


def test_another_tokenizer_is_another_training(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    session = supervised.start("sft", "", ["--run", str(run.root), "--out", str(tmp_path / "out")])
    base, other = run.artifact("prefetch", "model"), tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text("{}")
    one, two = (supervised._manual_name(session, base, folder) for folder in (base, other))
    assert one != two and one == supervised._manual_name(session, base, base)
