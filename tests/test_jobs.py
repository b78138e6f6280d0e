"""Stages as jobs: what a user sees when things go well, go wrong, or are killed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from helpers_jobs import command, nothing_left, pids_running, start, submit, wait_for

from pipeline import procs
from pipeline.run import events
from pipeline.run.directory import RunDir
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.state import recorded_state, resolve

pytestmark = pytest.mark.chain


@pytest.fixture(scope="module")
def prefetched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("jobs") / "run"
    done = submit(run, "--stage", "prefetch")
    assert done.status == 0, done.err
    return run


def test_a_stage_leaves_its_outputs_log_and_history(prefetched: Path) -> None:
    run = RunDir(prefetched)
    outputs = run.outputs("prefetch")
    assert outputs is not None and outputs.values["train_rows"] == 96
    attempt = run.attempt("prefetch", 1)
    assert json.loads((attempt / "exit.json").read_text())["status"] == 0
    assert json.loads((attempt / "job.json").read_text())["argv"][1:3] == ["-m", "pipeline.data.prefetch"]
    assert [event["event"] for event in events.read(run)][:1] == ["configuration written"]
    assert (prefetched / "data" / "train.jsonl").is_file()  # the convenience link
    assert nothing_left(prefetched)  # the command returned when its jobs' processes were gone


def test_the_same_command_again_does_nothing(prefetched: Path) -> None:
    before = (prefetched / "events.jsonl").read_text()
    done = submit(prefetched, "--stage", "prefetch")
    assert done.status == 0
    assert "nothing to do, every stage is up to date" in done.out
    assert (prefetched / "events.jsonl").read_text() == before


def test_status_and_logs_show_the_stage(prefetched: Path) -> None:
    status = command("status", prefetched)
    assert status.status == 0
    assert "prefetch" in status.out and "done" in status.out
    assert "96 training" in status.out
    assert command("logs", prefetched, "prefetch").status == 0
    assert "sft: has not run yet" in command("logs", prefetched, "sft").err
    assert "did you mean 'prefetch'" in command("logs", prefetched, "prefetsch").err
    assert "not a run directory" in command("status", prefetched.parent).err


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = submit(tmp_path / "run", "--dry-run")
    assert done.status == 0
    for line in ("first run", "serves train", "pipeline.training.launch", "tritonserver", "job serve+train"):
        assert line in done.out
    assert not (tmp_path / "run").exists()


def test_a_failed_stage_is_one_line_and_cancels_what_waits_for_it(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "train.jsonl").write_text('{"chosen": "no turns", "rejected": "none"}\n')
    (rows / "test.jsonl").write_text("")
    run = tmp_path / "run"
    done = submit(run, "--stage", "prefetch,sft", "--set", f"data.source={rows}")
    assert done.status == 1
    assert "error: prefetch:" in done.err and "train.jsonl" in done.err
    assert "Traceback" not in done.err
    states = {stage: recorded_state(RunDir(run), stage) for stage in ("prefetch", "sft")}
    assert states["sft"] is not None and states["sft"].state == "cancelled"
    assert states["sft"].reason == "prefetch failed"
    assert RunDir(run).outputs("prefetch") is None
    assert nothing_left(run)


@pytest.mark.parametrize("victim", ["controller", "task", "work"])
def test_a_killed_job_is_seen_and_the_same_command_finishes(tmp_path: Path, victim: str) -> None:
    run = tmp_path / "run"
    follower = start(run, "--stage", "prefetch")
    wait_for(lambda: pids_running(run, "pipeline.data.prefetch"), "the work to start")
    words = {"controller": "submitit.local._local", "task": "submitit.core._submit", "work": "pipeline.data.prefetch"}
    for pid in pids_running(run, words[victim]):
        os.kill(pid, signal.SIGKILL)
    assert follower.wait(60) == 1
    wait_for(lambda: nothing_left(run), "every process to end")
    submission = submissions.read(RunDir(run))
    assert submission is not None
    assert resolve(RunDir(run), submission, "prefetch").state == "failed"
    assert submit(run, "--stage", "prefetch").status == 0
    assert RunDir(run).outputs("prefetch") is not None


def test_jobs_outlive_their_submitter_and_a_second_one_follows_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start(run, "--stage", "prefetch")
    wait_for(lambda: pids_running(run, "submitit"), "the job to start")
    wait_for(lambda: not (run / "control" / "submit.lock").exists(), "the lock to be given back")
    first.kill()
    first.wait()
    second = submit(run, "--stage", "prefetch")
    assert second.status == 0
    assert "are running already; following them" in second.out
    assert len(list((run / "stages" / "prefetch" / "attempts").iterdir())) == 1


def test_a_running_jobs_configuration_cannot_be_changed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, "--stage", "prefetch")
    wait_for(lambda: pids_running(run, "submitit"), "the job to start")
    wait_for(lambda: not (run / "control" / "submit.lock").exists(), "the lock to be given back")
    other = submit(run, "--stage", "prefetch", "--set", "seed=7")
    assert other.status == 2
    assert "alive and read another configuration" in other.err
    assert submit(run, "--stage", "prefetch").status == 0


def test_cancel_leaves_no_process_and_says_what_it_ended(tmp_path: Path) -> None:
    run = tmp_path / "run"
    follower = start(run, "--stage", "prefetch,sft,reward-model")
    wait_for(lambda: pids_running(run, "pipeline.data.prefetch"), "the work to start")
    done = command("cancel", run, "--grace", 5)
    assert done.status == 0
    assert "cancelled prefetch, sft, reward-model" in done.out
    assert procs.marked_pids(run) == []
    assert follower.wait(30) == 1
    assert "nothing was running" in command("cancel", run).out


def test_an_attempt_whose_place_another_job_took_ends_and_touches_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    follower = start(run, "--stage", "prefetch")
    wait_for(lambda: pids_running(run, "pipeline.data.prefetch"), "the work to start")
    before = (run / "stages" / "prefetch" / "state.json").read_text()
    (run / "stages" / "prefetch" / "attempts" / "0002").mkdir()
    assert follower.wait(60) == 1
    assert (run / "stages" / "prefetch" / "state.json").read_text() == before
    assert RunDir(run).outputs("prefetch") is None
    wait_for(lambda: nothing_left(run), "every process to end", 20)


def test_two_submitters_at_once_make_one_submission(tmp_path: Path) -> None:
    run = tmp_path / "run"
    both = [start(run, "--stage", "prefetch") for _ in range(2)]
    statuses = sorted(process.wait(120) for process in both)
    assert statuses in ([0, 0], [0, 2])  # the later one follows, or is told to wait
    assert len(list((run / "stages" / "prefetch" / "attempts").iterdir())) == 1


def test_an_earlier_evaluation_is_not_shown_as_another_stages_result(prefetched: Path, tmp_path: Path) -> None:
    done = submit(prefetched, "--stage", "prefetch", "--force")
    assert done.status == 0
    assert "held-out" not in done.out


def test_a_forced_job_that_starts_again_does_not_redo_what_it_has_done(prefetched: Path) -> None:
    assert submit(prefetched, "--stage", "prefetch", "--force").status == 0
    run = RunDir(prefetched)
    before, forced = run.outputs("prefetch"), submissions.read(run)
    assert before is not None and forced is not None
    again = command("stages.job", prefetched, "prefetch", forced.id)  # as Slurm does that queued it again at its end
    assert (again.status, run.outputs("prefetch")) == (0, before), again.err
    state = recorded_state(run, "prefetch")
    assert state is not None
    assert state.state == "skipped"


def test_a_path_that_jobs_cannot_use_is_refused(tmp_path: Path) -> None:
    for name in ("50 %j", "12:30"):  # submitit fills in the one, PYTHONPATH is cut at the other
        done = submit(tmp_path / name, "--stage", "prefetch")
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert "choose a path without it" in done.err
        assert not (tmp_path / name).exists()


def test_a_run_directory_of_another_version_is_refused_by_every_command(prefetched: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text((prefetched / "config.yaml").read_text())
    (run / "provenance.json").write_text('{"layout_version": 0, "version": "0.0.1"}')
    for name, *rest in (("submit", "--run-dir", run), ("status", run), ("logs", run, "sft"), ("cancel", run)):
        done = command(name, *rest)
        assert done.status == 2, name
        assert "made by version 0.0.1 of this project" in done.err
