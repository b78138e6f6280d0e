"""Running the commands as a user does, and looking at what is left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pytest import MonkeyPatch

from pipeline import procs
from pipeline.run.directory import RunDir
from pipeline.serving import shared_memory

ROOT = Path(__file__).resolve().parents[1]

TINY = (
    *("data.demo.train=96", "data.demo.test=24"),
    "model.embedded={vocab_size: 400, hidden_size: 32, num_layers: 3, num_heads: 2, max_positions: 256}",
    *("sft.epochs=1", "sft.num_processes=1", "reward_model.num_processes=1", "sft.max_length=200"),
    *("reward_model.max_length=200", "serving.max_length=256", "train.seq_length=200"),
    *("train.total_steps=12", "train.batch_size=4", "train.eval_prompts=8", "train.eval_interval=6"),
    *("train.checkpoint_interval=4", "ppo.num_rollouts=8", "ppo.chunk_size=8", "ppo.ppo_epochs=2"),
    *("generate.max_new_tokens=12", "evaluate.num_prompts=16", "evaluate.num_samples=2", "train.tracker=none"),
)
"""Overrides of the demo preset that make every stage as short as it can be."""


@dataclass(frozen=True)
class Done:
    """A finished command."""

    status: int
    out: str
    err: str


def command(*arguments: object, env: dict[str, str] | None = None, timeout_s: float = 900) -> Done:
    """Run `python -m pipeline.<name> ...`."""
    name, *rest = (str(argument) for argument in arguments)
    done = subprocess.run(
        [sys.executable, "-m", f"pipeline.{name}", *rest],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**clean_environment(), **(env or {})},
        timeout=timeout_s,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def clean_environment() -> dict[str, str]:
    """This environment without what would change a run."""
    gone = ("TRITON_HOST", "CONFIG_NAME", "COLUMNS")  # who runs tests side by side sets the last one
    return {key: value for key, value in os.environ.items() if key not in gone}


def submit(run: Path, *arguments: object, overrides: tuple[str, ...] = TINY, env: dict[str, str] | None = None) -> Done:
    """Submit stages of the tiny run and follow them."""
    settings = [part for override in overrides for part in ("--set", override)]
    return command("submit", "--preset", "demo", "--run-dir", run, *settings, *arguments, env=env)


def start(run: Path, *arguments: object, overrides: tuple[str, ...] = TINY) -> subprocess.Popen[bytes]:
    """The same, in the background."""
    settings = [part for override in overrides for part in ("--set", override)]
    argv = ["--preset", "demo", "--run-dir", str(run), *settings, *(str(argument) for argument in arguments)]
    follower = subprocess.Popen(
        [sys.executable, "-m", "pipeline.submit", *argv],
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _followers.append(follower)
    return follower


_followers: list[subprocess.Popen[bytes]] = []


def end_followers() -> None:
    """End those that a test which failed has left."""
    while _followers:
        follower = _followers.pop()
        if follower.poll() is None:
            follower.kill()
            follower.wait()


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 120) -> None:
    """Poll until `condition` holds; fail with `what` when it does not within the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.05)


def until_training(finished: Path, run: Path) -> Path:
    """A copy of the finished run in which the training and what follows it have not happened."""
    return copy_without(finished, run, "serve", "train", "evaluate")


def copy_without(finished: Path, run: Path, *stages: str) -> Path:
    """A copy of the finished run in which some stages have not happened, and nothing was submitted."""
    shutil.copytree(finished, run, symlinks=True)
    for stage in stages:
        shutil.rmtree(run / "stages" / stage, ignore_errors=True)
    gone = ["services", "cache", "submission.json", *(f"models/{stage}" for stage in stages)]
    for stage, paths in _MADE_BY.items():
        gone += paths if stage in stages else ()
    for path in gone:
        target = run / path
        if target.is_symlink() or target.is_file():
            target.unlink()
        else:
            shutil.rmtree(target, ignore_errors=True)
    return run


_MADE_BY = {
    "prefetch": ("data",),
    "convert": ("model_store",),
    "train": ("checkpoints", "models/policy", "metrics.jsonl"),
    "evaluate": ("report",),
}
"""What stages leave at the top of the run directory."""


def pids_running(run: Path, *words: str) -> list[int]:
    """The run's processes whose command line holds all `words`."""
    found = []
    for pid in procs.marked_pids(run):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if all(word in line for word in words):
            found.append(pid)
    return found


def nothing_left(run: Path) -> bool:
    """Whether no process of the run lives, and no server left shared memory behind that nobody maps."""
    return not procs.marked_pids(run) and not orphaned_regions(run)


def orphaned_regions(run: Path) -> list[str]:
    """Shared memory that no process maps, of the run's servers."""
    stores = (run / "stages" / "convert" / "attempts").glob("*/out/model_store")
    marks = {shared_memory.store_mark(store) for store in stores}
    regions = {str(path) for path in Path("/dev/shm").glob("triton_hh_*") if path.name.split("_")[5] in marks}
    for maps in Path("/proc").glob("[0-9]*/maps") if regions else ():
        try:
            text = maps.read_text()
        except OSError:
            continue
        regions -= {region for region in regions if region in text}
    return sorted(regions)


def policy_sha256(run: Path) -> str:
    """The trained policy's content hash, as the run recorded it."""
    outputs = RunDir(run).outputs("train")
    assert outputs is not None
    return outputs.artifacts["policy"].sha256


FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified'; exit 1"
"""What scontrol and squeue say of a job that Slurm knows no more, for `fake_slurm`."""


def fake_slurm(monkeypatch: MonkeyPatch, folder: Path, **commands: str) -> Path:
    """Put shell scripts in front on PATH; each also notes how it was called."""
    for name, body in commands.items():
        script = folder / name
        script.write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/calls\n{body}\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder / "calls"
