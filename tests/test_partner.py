"""A server and its training in jobs of their own, whose scripts a person submits again: each waits for the other."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest
from helpers_jobs import fake_slurm

from pipeline.run.directory import RunDir
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.state import set_state
from pipeline.scheduler.submission import Job, Submission
from pipeline.stages import partner
from pipeline.stages.partner import Partner

APART = Submission("s1", "slurm", (Job(("serve",), job_id="7"), Job(("train",), beside=("serve",), job_id="8")))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Both jobs are over: the training failed, and the server ended with it."""
    monkeypatch.setattr(submissions, "_asked", {})
    monkeypatch.setattr(submissions, "SLURM_S", 0.0)
    monkeypatch.setattr(partner, "LOOK_S", 0.0)
    fake_slurm(monkeypatch, tmp_path, squeue=f"cat {tmp_path}/queue", scontrol="exit 1", sacct="exit 1")
    run = RunDir(tmp_path)
    queue_holds(run)
    submissions.write(run, APART)
    set_state(run, "train", "s1", "failed", "reward is not finite")
    set_state(run, "serve", "s1", "done", "ended with the training that it served")
    time.sleep(0.01)
    return run


def queue_holds(run: RunDir, *lines: str) -> None:
    (run.root / "queue").write_text("".join(f"{line}\n" for line in lines))


def begins(run: RunDir, stage: str, job_id: str) -> Submission:
    """A job whose script was submitted by hand starts, and says so."""
    job = APART.job_of(stage)
    assert job is not None
    submission = submissions.adopt(run, APART, job, job_id)
    set_state(run, stage, "s1", "pending")
    return submission


def test_a_server_waits_for_the_training_that_is_submitted_after_it_and_ends_with_that(run: RunDir) -> None:
    training = Partner(run, begins(run, "serve", "9"), "serve", "train")
    assert training.ended() is None  # that it failed was before
    queue_holds(run, "9|RUNNING", "10|RUNNING")
    begins(run, "train", "10")
    set_state(run, "train", "s1", "running")
    assert training.ended() is None
    set_state(run, "train", "s1", "failed", "again")
    assert training.ended() == "train failed: again"
    assert not training.missed


def test_a_training_waits_for_the_server_that_is_submitted_after_it_and_sees_its_death(run: RunDir) -> None:
    server = Partner(run, begins(run, "train", "9"), "train", "serve")
    assert server.ended() is None
    queue_holds(run, "9|RUNNING", "10|RUNNING")
    begins(run, "serve", "10")
    set_state(run, "serve", "s1", "running")
    assert server.ended() is None
    queue_holds(run, "9|RUNNING")
    assert server.ended() == "serve failed: died (job 10): it was killed or lost its node"


def test_a_server_that_still_runs_serves_the_training_that_takes_the_place_of_a_dead_one(run: RunDir) -> None:
    for stage in ("serve", "train"):
        set_state(run, stage, "s1", "running")
    queue_holds(run, "7|RUNNING", "8|RUNNING")
    training = Partner(run, APART, "serve", "train")
    assert training.ended() is None
    queue_holds(run, "7|RUNNING", "9|RUNNING")  # 8 was killed without a word
    server = Partner(run, begins(run, "train", "9"), "train", "serve")
    assert (training.ended(), server.ended()) == (None, None)
    queue_holds(run, "7|RUNNING")
    assert training.ended() == "train failed: died (job 9): it was killed or lost its node"


def test_a_server_that_was_about_to_end_with_the_earlier_training_is_no_end_of_the_new_one(run: RunDir) -> None:
    set_state(run, "serve", "s1", "running")
    queue_holds(run, "7|RUNNING", "9|RUNNING")
    server = Partner(run, begins(run, "train", "9"), "train", "serve")
    assert server.ended() is None
    set_state(run, "serve", "s1", "done", "ended with the training that it served")
    assert server.ended() is None  # its script may be submitted again, too


def test_who_is_submitted_alone_gives_up_unless_the_other_waits_in_the_queue(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partner, "PATIENCE_S", 0.0)
    server = Partner(run, begins(run, "train", "9"), "train", "serve")
    queue_holds(run, f"9|{run.root}/jobs/s1-train/x.sh", f"10|{run.root}/jobs/s1-serve/x.sh")
    assert server.ended() is None
    queue_holds(run, f"9|{run.root}/jobs/s1-train/x.sh")
    said = "serve done: ended with the training that it served; its script was not submitted again within 0 min"
    assert server.ended() == said
    assert server.missed


def test_a_server_that_is_submitted_after_a_training_that_ended_well_has_nothing_to_do(run: RunDir) -> None:
    set_state(run, "train", "s1", "done")
    assert Partner(run, begins(run, "serve", "9"), "serve", "train").ended() == "train done: "


def test_jobs_of_the_submission_itself_believe_what_the_other_said(run: RunDir) -> None:
    assert Partner(run, APART, "serve", "train").ended() == "train failed: reward is not finite"
    assert Partner(run, APART, "train", "serve").ended() == "serve done: ended with the training that it served"


def test_jobs_that_begin_at_the_same_moment_are_both_recorded(run: RunDir) -> None:
    fork = multiprocessing.get_context("fork")
    starts = [
        fork.Process(target=begins, args=(run, stage, job_id)) for stage, job_id in (("serve", "9"), ("train", "10"))
    ]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    recorded = submissions.read(run)
    assert recorded is not None
    assert [job.job_id for job in recorded.jobs] == ["9", "10"]
    assert all(job.by_hand > 0 for job in recorded.jobs)
