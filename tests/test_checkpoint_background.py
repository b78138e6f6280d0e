"""Checkpoints that are written while training goes on: what they hold, what fails, and which best policies stay."""

from __future__ import annotations

import json
import shutil
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers_jobs import wait_for
from safetensors.torch import load_file
from test_checkpoint_files import ALONE, accelerator_of

from pipeline.errors import UserError
from pipeline.training import checkpoint, checkpoint_files
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.checkpoint_files import BEST, all_checkpoints, is_intact
from pipeline.training.ranks import Ranks
from pipeline.training.snapshot import copies
from pipeline.training.writer import Writer


class Gate:
    """Holds the writer up until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        original = checkpoint.write_part

        def held(*arguments: Any) -> None:
            assert self.opened.wait(30)
            original(*arguments)

        patch.setattr(checkpoint, "write_part", held)


def background(folder: Path, keep: int = 3) -> tuple[Checkpoints, Accelerator, torch.nn.Linear]:
    model = torch.nn.Linear(2, 1)
    return Checkpoints(folder, ALONE, keep, background=True), accelerator_of(model), model


def test_what_is_written_is_what_was_when_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    checkpoints, accelerator, model = background(tmp_path)
    torch.nn.init.constant_(model.weight, 3.0)
    extra = {"states": [torch.ones(2, 3)[:1]], "row": {"loss": 0.5}, "finish": "eos"}
    torch.manual_seed(7)
    checkpoints.save(accelerator, 3, {}, extra)
    coming = torch.rand(4)
    torch.nn.init.constant_(model.weight, 4.0)  # training goes on
    extra["states"][0].fill_(9.0)
    assert all_checkpoints(tmp_path) == []
    gate.opened.set()

    state = checkpoints.load(accelerator)

    assert state is not None and state["step"] == 3 and model.weight.tolist() == [[3.0, 3.0]]
    assert torch.equal(torch.rand(4), coming)
    loaded = checkpoints.extra()
    assert loaded["states"][0].tolist() == [[1.0, 1.0, 1.0]] and loaded["finish"] == "eos"


def test_copies_share_no_memory_and_carry_no_more_than_they_show() -> None:
    whole = torch.arange(1000.0)
    (copied,) = copies({"part": [whole[:2]]})["part"]
    whole.zero_()
    assert copied.tolist() == [0.0, 1.0] and copied.untyped_storage().nbytes() == 8


def test_a_disk_that_fails_meanwhile_is_one_line_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, accelerator, _ = background(tmp_path)
    checkpoints.save(accelerator, 2, {})
    checkpoints.wait()

    def full(path: Path, content: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "write_file", full)
    checkpoints.save(accelerator, 4, {})
    checkpoints.save_best(accelerator, 4, 1.0)  # is not tried any more
    with pytest.raises(UserError, match=r"step-00000004\.unfinished: cannot write: the disk is full"):
        checkpoints.save(accelerator, 6, {})
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step-00000002"]
    assert (tmp_path / "latest").resolve().name == "step-00000002"
    assert not (tmp_path / "step-00000004.unfinished").exists()


def test_at_most_two_copies_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    checkpoints, accelerator, _ = background(tmp_path)
    checkpoints.save_best(accelerator, 2, 0.5)
    checkpoints.save(accelerator, 2, {"best_step": 2})
    third = threading.Thread(target=lambda: checkpoints.save(accelerator, 4, {"best_step": 2}))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    gate.opened.set()
    third.join(30)
    checkpoints.wait()
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]


def test_the_best_policy_outlives_the_checkpoint_of_its_step(tmp_path: Path) -> None:
    checkpoints, accelerator, model = background(tmp_path, keep=1)
    for step, best in ((2, 2), (4, 4), (6, 4), (8, 4)):
        torch.nn.init.constant_(model.weight, float(step))
        if step == best:
            checkpoints.save_best(accelerator, step, 0.1 * step)
        checkpoints.save(accelerator, step, {"best_step": best})
    checkpoints.wait()
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step-00000008"]
    assert [path.name for path in all_checkpoints(tmp_path, BEST)] == ["best-00000004"]
    assert is_intact(tmp_path / "best") and json.loads((tmp_path / "best/state.json").read_text())["figure"] == 0.4
    assert load_file(tmp_path / "best/model.safetensors")["weight"].tolist() == [[4.0, 4.0]]
    assert not checkpoints.load_best(accelerator, 2)
    assert checkpoints.load_best(accelerator, 4) and model.weight.tolist() == [[4.0, 4.0]]


def test_a_best_policy_stays_while_a_checkpoint_that_stays_knows_it(tmp_path: Path) -> None:
    checkpoints, accelerator, _ = background(tmp_path, keep=2)
    for step in (2, 4):
        checkpoints.save_best(accelerator, step, 0.1 * step)
        checkpoints.save(accelerator, step, {"best_step": step})
    checkpoints.wait()
    assert [path.name for path in all_checkpoints(tmp_path, BEST)] == ["best-00000002", "best-00000004"]


def test_best_weights_of_steps_that_a_resume_goes_back_behind_are_forgotten(tmp_path: Path) -> None:
    checkpoints, accelerator, _ = background(tmp_path)
    for step in (2, 4):
        checkpoints.save_best(accelerator, step, 0.1 * step)
        checkpoints.save(accelerator, step, {"best_step": step})
    checkpoints.wait()
    shutil.rmtree(tmp_path / "step-00000004")
    assert (checkpoints.load(accelerator) or {})["step"] == 2
    assert [path.name for path in all_checkpoints(tmp_path, BEST)] == ["best-00000002"]
    assert (tmp_path / "best").resolve().name == "best-00000002"


def test_a_training_that_fails_ends_behind_the_checkpoint_that_it_was_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    checkpoints, accelerator, _ = background(tmp_path)
    with pytest.raises(ValueError, match="a bug"), checkpoints.finishing():
        checkpoints.save(accelerator, 2, {})
        threading.Timer(0.2, gate.opened.set).start()
        raise ValueError("a bug")
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step-00000002"]


class Together(Ranks):
    """One of two ranks, each a thread of this process."""

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, 2, torch.device("cpu"))
        object.__setattr__(self, "_meet", (shared, barrier))

    def gather(self, value: Any) -> list[Any]:
        shared, barrier = self.__dict__["_meet"]
        shared[self.rank] = value
        barrier.wait(20)
        values = list(shared)
        barrier.wait(20)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.gather(values)).sum(dim=0)


def test_a_disk_that_fails_on_one_rank_is_an_error_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = accelerator_of(torch.nn.Linear(2, 1))
    shared, barrier, real = [None, None], threading.Barrier(2), checkpoint_files.write_file
    ranks = [Checkpoints(tmp_path, Together(rank, shared, barrier), 3, background=True) for rank in range(2)]

    def each(work: Callable[[Checkpoints], Any]) -> list[Any]:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(work, ranks))

    def saved(step: int) -> Callable[[Checkpoints], str]:
        def save(checkpoints: Checkpoints) -> str:
            try:
                checkpoints.save(accelerator, step, {}, extra={"step": step})
                checkpoints.wait()
            except UserError as error:
                return str(error)
            return "saved"

        return save

    def full_on_the_second(path: Path, content: Any) -> None:
        if path.name == "phase_1.bin":
            raise OSError(28, "No space left on device")
        real(path, content)

    assert each(saved(2)) == ["saved", "saved"]
    monkeypatch.setattr(checkpoint_files, "write_file", full_on_the_second)
    one, other = each(saved(4))
    assert one == other and "step-00000004.unfinished: cannot write: the disk is full" in one
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002", "latest"}
    assert (tmp_path / "latest").resolve().name == "step-00000002"

    monkeypatch.setattr(checkpoint_files, "write_file", real)
    assert each(saved(4)) == ["saved", "saved"]  # the writers go on
    assert [state["step"] for state in each(lambda checkpoints: checkpoints.load(accelerator))] == [4, 4]
    assert [kept["step"] for kept in each(lambda checkpoints: checkpoints.extra())] == [4, 4]


def test_what_was_written_is_not_kept_in_memory() -> None:
    class Copies:
        """A checkpoint's."""

    writer, held = Writer(), Copies()
    alive, written = weakref.ref(held), threading.Event()
    writer.start(partial(lambda _copies: written.set(), held))
    del held
    assert written.wait(30)
    wait_for(lambda: alive() is None, "the copies to be released", 10)
    assert writer.wait() is None
