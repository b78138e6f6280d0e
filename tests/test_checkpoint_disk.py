"""What a full disk, a quota or a file size limit does to models and checkpoints: one line, and nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from helpers_ppo import tiny_model, tokenizer
from safetensors.torch import save_file

from pipeline.errors import UserError
from pipeline.procs import capture
from pipeline.run import atomic
from pipeline.training.checkpoint import Checkpoints, all_checkpoints, is_intact
from pipeline.training.models import save_model
from pipeline.training.ranks import Ranks


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to let a file of this process grow beyond `size` bytes (Python ignores its signal)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_model_over_the_file_size_limit_is_one_clear_line(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with largest_file(50_000), pytest.raises(UserError) as caught:
        save_model(tiny_model(), tokenizer(), folder)
    assert str(caught.value) == (
        f"{folder}: cannot write: a file would be larger than is allowed; "
        "raise the limit (ulimit -f) or choose another place"
    )


@pytest.mark.parametrize("how", ["path", "file"])
def test_torchs_own_writer_is_understood(how: str, tmp_path: Path) -> None:
    """To a path it does not say why it failed; to a file, the file's own error came before."""
    path, tensor = tmp_path / "tensor.pt", torch.zeros(50_000)
    with largest_file(50_000), pytest.raises(UserError) as caught, atomic.disk_errors(path):
        if how == "path":
            torch.save(tensor, path)
        else:
            with path.open("wb") as file:
                torch.save(tensor, file)
    assert str(caught.value).startswith(f"{path}: cannot write: ")
    assert "ulimit -f" in str(caught.value)


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    for error in (RuntimeError("shape mismatch"), FileNotFoundError(errno.ENOENT, "no"), ValueError("(os error 2)")):
        with pytest.raises(type(error)), atomic.disk_errors(tmp_path):
            raise error


FULL_DISK = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from pipeline.errors import UserError
from pipeline.run.atomic import append_line, disk_errors, write_text

root = Path(sys.argv[1])
tensor = torch.zeros(200_000)
def lines():
    while True:
        append_line(root / "lines", "x" * 1000)
writers = {
    "safetensors": lambda: save_file({"a": tensor}, root / "a.safetensors"),
    "torch": lambda: torch.save(tensor, root / "a.pt"),
    "text": lambda: write_text(root / "text", "x" * 800_000),
    "lines": lines,
}
for name, write in writers.items():
    try:
        with disk_errors(root / name):
            write()
    except UserError as error:
        print(f"{name}: {error}")
    for file in root.iterdir():
        file.unlink()
"""


def test_a_full_disk_is_one_clear_line_whoever_writes(tmp_path: Path) -> None:
    private = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=256k tmpfs {tmp_path} && "
    try:
        status, said = capture([*private, mount + "true"])
    except UserError as error:
        status, said = 1, str(error)
    if status != 0:
        pytest.skip(f"no small file system can be mounted here: {said.strip()}")
    status, said = capture([*private, mount + 'exec "$0" -c "$1" "$2"', sys.executable, FULL_DISK, str(tmp_path)])
    assert status == 0, said
    full = "cannot write: the disk is full; free some space or choose another place"
    assert said.splitlines() == [
        f"{name}: {tmp_path}/{name}: {full}" for name in ("safetensors", "torch", "text", "lines")
    ]


def checkpoints_of(folder: Path, keep: int) -> tuple[Checkpoints, Accelerator, torch.nn.Linear]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    model = torch.nn.Linear(200, 100)
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    return Checkpoints(folder, Ranks(0, 1, torch.device("cpu")), keep), accelerator, model


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before_and_no_rest(tmp_path: Path) -> None:
    checkpoints, accelerator, _ = checkpoints_of(tmp_path, keep=1)
    checkpoints.save(accelerator, 2, {})
    with largest_file(50_000), pytest.raises(UserError, match=r"step-00000004\.unfinished: cannot write: a file would"):
        checkpoints.save(accelerator, 4, {})
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000002"]
    assert is_intact(tmp_path / "step-00000002")


def damage(checkpoint: Path) -> None:
    save_file({"weight": torch.zeros(1)}, checkpoint / "model.safetensors")


def test_a_damaged_checkpoint_never_drives_out_an_intact_one(tmp_path: Path) -> None:
    checkpoints, accelerator, model = checkpoints_of(tmp_path, keep=2)
    for step in (2, 4):
        torch.nn.init.constant_(model.weight, float(step))
        checkpoints.save(accelerator, step, {})
    damage(tmp_path / "step-00000004")

    state = checkpoints.load(accelerator)

    assert state is not None and state["step"] == 2 and bool((model.weight == 2.0).all())
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step-00000002"]
    assert (tmp_path / "latest").resolve().name == "step-00000002"


def test_the_checkpoint_just_made_stays_whatever_lies_beside_it(tmp_path: Path) -> None:
    checkpoints, accelerator, _ = checkpoints_of(tmp_path, keep=1)
    checkpoints.save(accelerator, 8, {})
    damage(tmp_path / "step-00000008")
    checkpoints.save(accelerator, 4, {})  # not loaded before: the damaged, newer one is still there
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step-00000004"]
    assert is_intact(tmp_path / "step-00000004")
    assert (tmp_path / "latest").resolve().name == "step-00000004"


def test_with_nothing_intact_training_begins_anew(tmp_path: Path) -> None:
    checkpoints, accelerator, _ = checkpoints_of(tmp_path, keep=1)
    checkpoints.save(accelerator, 2, {})
    damage(tmp_path / "step-00000002")
    assert checkpoints.load(accelerator) is None
    assert list(tmp_path.iterdir()) == []
