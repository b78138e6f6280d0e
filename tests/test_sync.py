"""What trainings wrote offline reaches Weights & Biases once, as one run, from a machine with internet.

`wandb sync` is the real one; what answers it is a stand-in for the server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_jobs import ROOT, Done, command
from helpers_wandb import StandInServer, standing_in
from test_ppo_tracking import KEY, python

from pipeline import procs
from pipeline.config.load import dump, load_preset, resolve
from pipeline.run.directory import Outputs, RunDir
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.state import set_state
from pipeline.scheduler.submission import Job, Submission
from pipeline.sync import segments, unsent
from pipeline.training.tracking import run_id

pytest.importorskip("wandb")

SEGMENT = """
import sys
from pathlib import Path
from pipeline.config.load import resolve
from pipeline.training.ranks import make_accelerator
from pipeline.training.tracking import run_id, start_tracker, tracker_of
config = resolve({"train": {"tracker": "wandb"}})
folder = Path(%r)
accelerator = make_accelerator(1, tracker_of(config), folder / "tracker")
start_tracker(accelerator, config, ["ppo"], folder / "tracker", folder.name, run_id(folder, "f00d"))
for step in %r:
    accelerator.log({"reward": step / 10}, step=step)
accelerator.end_training()
"""


def train(run: RunDir, steps: list[int]) -> None:
    """A segment of a training, as far as wandb sees it, on a node without internet."""
    python(SEGMENT % (str(run.root), steps), run.root.parent, WANDB_MODE="offline")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "a run")
    run.root.mkdir()
    run.config.write_text(dump(resolve(load_preset("demo"))))
    run.write_outputs(Outputs("train", "f00d", 1))
    return run


@pytest.fixture
def server() -> Iterator[StandInServer]:
    with standing_in() as server:
        yield server


def sync(run: RunDir, url: str, *arguments: str, key: str = KEY) -> Done:
    home = {"HOME": str(run.root.parent), "WANDB_BASE_URL": url, "WANDB_API_KEY": key, "no_proxy": "127.0.0.1"}
    done = command("sync", run.root, *arguments, env=home)
    assert not (ROOT / "wandb").exists()  # its logs are the run's
    return done


def test_the_segments_of_a_training_become_one_run_and_are_sent_once(run: RunDir, server: StandInServer) -> None:
    train(run, [1, 2, 3])
    train(run, [4, 5])
    listed = sync(run, server.url, "--dry-run")
    assert (listed.out.count("would send offline-run-"), server.runs) == (2, {})
    done = sync(run, server.url)
    assert done.status == 0, done.err
    identity = run_id(run.root, "f00d")
    assert {name: server.steps(name) for name in server.runs} == {identity: [1, 2, 3, 4, 5]}
    assert "nothing to send" in sync(run, server.url).out
    train(run, [6])
    done = sync(run, server.url)
    assert done.out.count("sending offline-run-") == 1
    assert server.steps(identity) == [1, 2, 3, 4, 5, 6]


def test_a_segment_that_was_killed_is_sent_as_far_as_it_goes(run: RunDir, server: StandInServer) -> None:
    train(run, list(range(400)))
    (segment,) = segments(run)
    data = segment.file.read_bytes()
    segment.file.write_bytes(data[: len(data) - 5000])
    done = sync(run, server.url)
    assert done.status == 0, done.err
    steps = server.steps(segment.identity)
    assert steps == list(range(len(steps)))
    assert 200 < len(steps) < 400
    assert "nothing to send" in sync(run, server.url).out  # its end will never come


def test_a_segment_that_is_still_written_waits_for_a_later_call(run: RunDir) -> None:
    for name in ("offline-run-20260101_000000-ab", "offline-run-20260102_000000-ab"):
        (run.tracker / "wandb" / name).mkdir(parents=True)
        (run.tracker / "wandb" / name / "run-ab.wandb").write_bytes(b"x")
    (run.stage("train") / "outputs.json").unlink()
    alive = Submission("s1", "local", (Job(("train",), job_id="7", process=procs.this_process()),))
    submissions.write(run, alive)
    set_state(run, "train", "s1", "running", attempt=1)
    chosen, growing = unsent(run)
    assert [each.folder.name[-18:-3] for each in chosen] == ["20260101_000000"]
    assert growing is not None and growing.folder.name[-18:-3] == "20260102_000000"
    set_state(run, "train", "s1", "stopped", attempt=1)
    assert len(unsent(run)[0]) == 2


def test_without_a_key_or_a_network_one_line_says_so_and_all_stays_to_be_sent(run: RunDir) -> None:
    train(run, [1])
    away = "http://127.0.0.1:9"
    done = sync(run, away, key="")
    assert (done.status, done.err.count("\n")) == (2, 1), done.err
    assert done.err.startswith("error: Weights & Biases finds no key for http://127.0.0.1:9; run: wandb login")
    done = sync(run, away)
    assert (done.status, done.err.count("\n")) == (2, 1), done.err
    assert "error: http://127.0.0.1:9: cannot be reached from here (" in done.err
    assert len(unsent(run)[0]) == 1
    assert not [name for name in os.listdir(run.root / "control") if name.startswith("sync.lock")]


def test_a_run_without_offline_data_has_nothing_to_send(run: RunDir) -> None:
    done = sync(run, "http://127.0.0.1:9")
    assert (done.status, "nothing to send" in done.out) == (0, True)
