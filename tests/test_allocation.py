"""What the submitter inside an allocation does when that ends. tests/cluster has it on a real Slurm."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import procs
from pipeline.config.cluster import Cluster
from pipeline.run.directory import Outputs, RunDir
from pipeline.run.lock import lock
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.allocation import Allocation, Ending, earlier_start, wind_up
from pipeline.scheduler.state import recorded_state, set_state
from pipeline.scheduler.submission import Job, Submission
from pipeline.stages.nodes import FOLLOWS, MEETING, Meeting, Nodes, of_job

CLUSTER = Cluster(executor="allocation", grace_s=27)
RUNNING = "JobState=RUNNING Restarts=0 BatchFlag=1 PreemptTime=None"


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def fake_scontrol(monkeypatch: pytest.MonkeyPatch, folder: Path, said: str) -> Path:
    path = folder / "scontrol"
    path.write_text(f'#!/bin/sh\necho "$*" >> {folder}/calls\necho "{said}"\n')
    path.chmod(0o755)
    (folder / "calls").touch()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder / "calls"


def running(run: RunDir, stage: str, command: str) -> Submission:
    """A submission whose first job is a process that runs `command`; the second waits for it."""
    first, second = (procs.process_of(procs.spawn(["bash", "-c", line]).pid) for line in (command, "sleep 600"))
    jobs = (Job((stage,), job_id="1", process=first), Job(("evaluate",), (stage,), job_id="2", process=second))
    set_state(run, stage, "s1", "running", attempt=1)
    set_state(run, "evaluate", "s1", "waiting")
    return Submission("s1", "allocation", jobs, allocation="71", time=time.time())


def saves(run: RunDir) -> str:
    """What a training does that is asked to stop."""
    return f"while ! test -f {run.stop_flag}; do sleep 0.1; done; mkdir -p {run.checkpoints}/f/step-00000012"


def following(run: RunDir, number: int) -> Ending:
    """As it is after a signal while the jobs are followed."""
    ending = Ending(run, Allocation("71", 0), requeue=True)
    ending.following = True
    os.kill(os.getpid(), number)
    assert ending
    return ending


def test_a_warned_training_is_asked_to_save_and_its_allocation_queued_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_scontrol(monkeypatch, tmp_path, RUNNING)
    run = RunDir(tmp_path / "run")
    submission = running(run, "train", f"trap 'touch {tmp_path}/killed' TERM; {saves(run)}")
    said = wind_up(run, submission, CLUSTER, following(run, signal.SIGUSR2))
    assert said == "interrupted by Slurm: job 71 waits in the queue again, and goes on from here"
    assert "requeue 71" in calls.read_text().splitlines()
    assert not (tmp_path / "killed").exists()  # it had its time
    for stage in ("train", "evaluate"):
        state = recorded_state(run, stage)
        assert state is not None
        assert (state.state, state.reason) == ("stopped", "interrupted by Slurm; goes on with job 71")


def test_a_training_that_takes_too_long_to_save_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_scontrol(monkeypatch, tmp_path, RUNNING)
    run = RunDir(tmp_path / "run")
    submission = running(run, "train", "sleep 600")
    started = time.monotonic()
    wind_up(run, submission, CLUSTER, following(run, signal.SIGUSR2))
    assert time.monotonic() - started < 20  # 27 seconds of grace, less those that a job has to end in


@pytest.mark.parametrize(
    ("number", "said", "cluster", "stage", "word"),
    [
        (signal.SIGTERM, "JobState=CANCELLED BatchFlag=1", CLUSTER, "train", "its jobs were ended"),
        (signal.SIGUSR2, RUNNING, Cluster(requeue=False, grace_s=27), "train", "what is done is kept"),
        (signal.SIGUSR2, RUNNING.replace("BatchFlag=1", "BatchFlag=0"), CLUSTER, "train", "what is done is kept"),
        (signal.SIGUSR2, RUNNING, CLUSTER, "sft", "sft, evaluate: not done within the allocation's time"),
    ],
)
def test_an_allocation_is_not_queued_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str, cluster: Cluster, stage: str, word: str
) -> None:
    calls = fake_scontrol(monkeypatch, tmp_path, said)
    run = RunDir(tmp_path / "run")
    submission = running(run, stage, saves(run) if stage == "train" else "sleep 600")
    assert word in wind_up(run, submission, cluster, following(run, number))
    assert "requeue" not in calls.read_text()
    assert submission.jobs[0].process is not None
    assert not submission.jobs[0].process.alive()


def test_a_training_that_saved_no_further_than_the_last_time_is_not_begun_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_scontrol(monkeypatch, tmp_path, RUNNING)
    run = RunDir(tmp_path / "run")
    (run.checkpoints / "f" / "step-00000012").mkdir(parents=True)
    submission = running(run, "train", f"{saves(run)}; touch {run.checkpoints}/f/step-00000012/new")
    said = wind_up(run, submission, CLUSTER, following(run, signal.SIGUSR2))
    assert said == "train, evaluate: not done within the allocation's time; give it more (sbatch --time)"
    assert (run.checkpoints / "f" / "step-00000012" / "new").exists()
    assert "requeue" not in calls.read_text()


def test_a_preempted_allocation_comes_back_though_nothing_was_done_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_scontrol(monkeypatch, tmp_path, RUNNING.replace("PreemptTime=None", "PreemptTime=2026-01-01T00:00:00"))
    run = RunDir(tmp_path / "run")
    submission = running(run, "sft", "sleep 600")
    assert "waits in the queue again" in wind_up(run, submission, CLUSTER, following(run, signal.SIGUSR2))
    assert "requeue 71" in calls.read_text().splitlines()


def test_a_preempted_allocation_with_a_grace_time_lets_its_training_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_scontrol(monkeypatch, tmp_path, RUNNING.replace("PreemptTime=None", "PreemptTime=2026-01-01T00:00:00"))
    run = RunDir(tmp_path / "run")
    saves = f"trap 'touch {tmp_path}/killed' TERM; while ! test -f {run.stop_flag}; do sleep 0.1; done"
    submission = running(run, "train", saves)
    assert "waits in the queue again" in wind_up(run, submission, CLUSTER, following(run, signal.SIGTERM))
    assert not (tmp_path / "killed").exists()


def test_an_end_while_planning_gives_the_runs_lock_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_scontrol(monkeypatch, tmp_path, RUNNING)
    Ending(RunDir(tmp_path / "run"), Allocation("71", 0), requeue=True)
    with pytest.raises(SystemExit, match="ended before its jobs had begun"), lock(tmp_path / "lock", "planning"):
        os.kill(os.getpid(), signal.SIGTERM)  # while the job runs on: preemption, without a warning
    assert not (tmp_path / "lock").exists()
    assert "requeue 71" in calls.read_text().splitlines()


def test_what_was_forced_is_forced_once_though_the_batch_script_forces_it_at_each_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, stages = RunDir(tmp_path), ("convert", "train")
    variables = {"SLURM_JOB_ID": "71", "SLURMD_NODENAME": "n1", "SLURM_RESTART_COUNT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert earlier_start(run, stages) is None
    forced = Submission("s1", "allocation", (), stages, allocation="71")
    submissions.write(run, forced)
    assert earlier_start(run, stages) == forced
    for other in (("train",), ()):  # another command, and one without --force
        assert earlier_start(run, other) is None
    for stranger in (replace(forced, allocation="70"), replace(forced, restart=1)):  # the last one in this very start
        submissions.write(run, stranger)
        assert earlier_start(run, stages) is None

    run.write_outputs(Outputs("convert", "f", 2, submission="s1"))
    run.write_outputs(Outputs("train", "f", 1, submission="s0"))
    assert submissions.still_forced(run, stages, forced) == ("train",)
    assert submissions.still_forced(run, stages, None) == stages


def test_the_nodes_of_a_job_in_an_allocation_meet_by_themselves(tmp_path: Path) -> None:
    leader = {MEETING: "s1", "SLURM_JOB_NUM_NODES": "3", "SLURM_PROCID": "0", "SLURM_JOB_ID": "71"}
    follower = {**leader, FOLLOWS: "1", "SLURM_PROCID": "1", "SLURM_NNODES": "2"}
    assert of_job(leader) == Nodes(3, 0)
    assert of_job(follower) == Nodes(3, 2)
    Meeting(RunDir(tmp_path), leader).beat(0, status="ended")
    assert Meeting(RunDir(tmp_path), follower).word(0)["status"] == "ended"
    assert Meeting(RunDir(tmp_path), {**leader, MEETING: "s2"}).word(0) == {}  # another job in that allocation
