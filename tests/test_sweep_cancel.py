"""Cancelling a sweep ends all its points, and the submitter that would start the next one."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from helpers_jobs import end_followers, fake_slurm, pids_running, start, wait_for
from test_sweep import demo

from pipeline import cancel, procs
from pipeline.config import load
from pipeline.run import atomic
from pipeline.run.directory import RunDir
from pipeline.run.lock import lock
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.state import recorded_state, set_state
from pipeline.scheduler.submission import Job, Submission
from pipeline.sweep.points import make_points, remember


def test_cancel_takes_a_whole_sweep_the_last_point_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else the end of one would let the next one start."""
    remember(tmp_path, make_points(["ppo.lam=0.9,0.95,1"]))
    pids = []
    for name in ("shared", "ppo.lam=0.9", "ppo.lam=0.95"):  # the third has not been submitted
        run = RunDir(tmp_path / name)
        atomic.write_text(run.config, load.dump(demo()))
        sleeper = subprocess.Popen(["sleep", "60"], start_new_session=True)
        pids.append(sleeper)
        job = Job(("train",), (), job_id=str(sleeper.pid), process=procs.process_of(sleeper.pid))
        submissions.write(run, Submission("s", "local", (job,), (), 0.0))
        set_state(run, "train", "s", "running")
    assert cancel.main([str(tmp_path), "--grace", "5"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [Path(line.partition(":")[0]).name for line in said] == ["ppo.lam=0.95", "ppo.lam=0.9", "shared"]
    assert all(line.endswith(": cancelled train") for line in said)
    assert [sleeper.wait(5) for sleeper in pids] == [-signal.SIGTERM] * 3


SLOW = """
import time
from pathlib import Path

words = Path("/proc/self/cmdline").read_text().split("\\0")
if "-m" in words and "pipeline.data.prefetch" in words:
    time.sleep(300)
"""
"""A sitecustomize.py under which the first stage takes long."""


def test_the_submitter_of_a_local_sweep_starts_no_other_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    folder = tmp_path / "s"
    submitter = start(folder, "--stage", "prefetch", "--sweep", "seed=1,2", overrides=())
    try:
        wait_for(lambda: pids_running(folder / "seed=1", "pipeline.data.prefetch"), "the first point's work")
        assert cancel.main([str(folder), "--grace", "1"]) == 0
        assert submitter.wait(30) == 130
    finally:
        end_followers()
    assert capsys.readouterr().out.endswith("seed=1: cancelled prefetch\n")
    assert (folder / "seed=1/config.yaml").exists() and not (folder / "seed=2/config.yaml").exists()


def on_slurm(folder: Path, *names: str) -> list[RunDir]:
    """Points with a job each: 11, 12, and so on."""
    remember(folder, make_points(["seed=1,2,3"]))
    runs = [RunDir(folder / name) for name in names]
    for number, run in enumerate(runs, 11):
        atomic.write_text(run.config, load.dump(demo()))
        submissions.write(run, Submission("s", "slurm", (Job(("train",), job_id=str(number)),)))
        set_state(run, "train", "s", "running")
    return runs


def states(runs: list[RunDir]) -> list[str]:
    return [state.state for run in runs if (state := recorded_state(run, "train"))]


def test_a_point_that_cannot_be_cancelled_keeps_none_of_the_others_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = on_slurm(tmp_path, "seed=1", "seed=2")
    other = RunDir(tmp_path / "seed=3")  # which is just being submitted
    refuse = """case " $* " in *" 12 "*) echo "scancel: error: Access denied"; exit 1;; esac"""
    fake_slurm(monkeypatch, tmp_path, squeue="echo 11; echo 12", scancel=refuse)
    monkeypatch.setattr(submissions, "_asked", {})
    with lock(other.root / "control" / "submit.lock", "submitting"):
        assert cancel.main([str(tmp_path), "--grace", "0"]) == 2
    said = capsys.readouterr()
    busy, refused = said.err.splitlines()
    assert busy.startswith(f"error: {other.root}/control/submit.lock: process ")
    assert refused == "error: scancel 12: scancel: error: Access denied; run it again"
    assert said.out.endswith("seed=1: cancelled train\n")
    assert states(runs) == ["cancelled", "running"]


def test_on_slurm_all_points_are_cancelled_before_any_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = on_slurm(tmp_path, "seed=1", "seed=2")
    gone = tmp_path / "gone"
    calls = fake_slurm(monkeypatch, tmp_path, squeue=f"[ -e {gone} ] || {{ echo 11; echo 12; }}", scancel=f": > {gone}")
    monkeypatch.setattr(submissions, "_asked", {})
    assert cancel.main([str(tmp_path), "--grace", "60"]) == 0
    assert [line for line in calls.read_text().splitlines() if "scancel" in line] == ["scancel 12 11"]
    assert states(runs) == ["cancelled", "cancelled"]
