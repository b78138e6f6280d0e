"""What becomes of a job that Slurm ends or warns, by what Slurm says of it. tests/cluster: with a real one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from helpers_jobs import fake_slurm

from pipeline import oom
from pipeline.config import load
from pipeline.config.cluster import Cluster
from pipeline.run import atomic
from pipeline.run.directory import RunDir
from pipeline.scheduler.state import State, recorded_state, set_state
from pipeline.stages import ending
from pipeline.stages.ending import Ending, Terminated
from pipeline.stages.execute import StageStopped

TRAINING = ("serve", "train")
SAVED = StageStopped("it saved its state and stopped as asked; submit again to go on", 1)


class Job:
    """Job 7 of submission s1, as its first start sees it, and the Slurm around it."""

    def __init__(self, run: RunDir, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], profile: object) -> None:
        self.run, self.names, self._monkeypatch = run, names, monkeypatch
        config = load.resolve({**load.load_preset("demo"), "preset": "demo"}, [], None)
        site = {"name": "site", "executor": "slurm", "requeue": True, "grace_s": 120, "default": {"time_min": 60}}
        cluster = Cluster.model_validate({**site, **dict(profile or {})})
        atomic.write_text(run.root / "config.yaml", load.dump(config.model_copy(update={"cluster": cluster})))
        for name, value in (("SUBMITIT_EXECUTOR", "slurm"), ("SLURM_JOB_ID", "7"), ("SLURM_RESTART_COUNT", "0")):
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(oom, "kills", lambda: 0)
        (run.root / "bin").mkdir()
        for name in names:
            set_state(run, name, "s1", "running", attempt=1)
        self.reached(4)
        self.ending = Ending(run, "s1", names)
        self.ending.listen()

    def slurm_says(self, fields: str, requeue: str = ":") -> None:
        """From now on, of the job; scontrol's other orders are obeyed, but for a requeue where that is told."""
        show = fields if "JobState" not in fields else f"echo JobId=7 Restarts=0 Partition=gpu {fields}"
        body = f'case "$1" in --oneliner) {show};; requeue) {requeue};; esac'
        self.calls = fake_slurm(self._monkeypatch, self.run.root / "bin", scontrol=body, sinfo="echo 'n1 9 infinite'")

    def reached(self, step: int) -> None:
        (self.run.checkpoints / "f" / f"step-{step:08d}").mkdir(parents=True)

    def signalled(self, number: signal.Signals) -> bool:
        """Send the signal; whether it ended the job's work."""
        try:
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # where Python runs the handler
        except Terminated as end:
            self.ending.settle(end)
            return True
        return False

    @property
    def queued_again(self) -> bool:
        return "scontrol requeue 7" in self.calls.read_text()

    @property
    def state(self) -> State:
        state = recorded_state(self.run, self.names[-1])
        assert state is not None
        return state


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    yield lambda names=TRAINING, **profile: Job(RunDir(tmp_path), monkeypatch, names, profile)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def at(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))


RUNNING, LATE = f"JobState=RUNNING EndTime={at(7200)}", f"JobState=RUNNING EndTime={at(130)}"
PREEMPTED = f"{LATE} PreemptTime={at(0)} TimeLimit=01:00:00"
OUT_OF_TIME = "JobState=COMPLETING Reason=TimeLimit TimeLimit=01:00:00"


def test_a_term_with_time_left_has_the_training_save_and_the_next_one_ends_the_job(job) -> None:
    it = job()
    it.slurm_says(PREEMPTED)
    assert not it.signalled(signal.SIGTERM)
    assert it.run.stop_flag.read_text() == ending.REQUEUED
    it.ending.settle(SAVED)
    assert (it.state.state, it.queued_again, it.run.stop_flag.exists()) == ("pending", True, False)

    it.run.stop_flag.write_text(ending.REQUEUED)
    signal.signal(signal.SIGTERM, it.ending._on_term)
    assert it.signalled(signal.SIGTERM)
    assert it.state.reason == "interrupted by Slurm; it waits in the queue again"


@pytest.mark.parametrize("name", ["sft", "reward-model"])
def test_a_supervised_training_is_asked_by_a_flag_of_its_own(job, name: str) -> None:
    it = job((name,))
    flag = it.run.save_flag(name)
    it.slurm_says(PREEMPTED)
    assert not it.signalled(signal.SIGUSR2)
    assert flag.read_text() == ending.REQUEUED and not it.run.stop_flag.exists()  # others train on
    (it.run.checkpoints / f"{name}-f" / "step-00000009").mkdir(parents=True)
    it.ending.settle(SAVED)
    assert (it.state.state, it.queued_again, flag.exists()) == ("pending", True, False)


def test_other_work_has_nothing_to_save(job) -> None:
    it = job(("convert",))
    it.slurm_says(PREEMPTED)
    assert not it.signalled(signal.SIGUSR2)  # it may still end in time
    assert it.signalled(signal.SIGTERM)
    assert (it.state.state, it.queued_again) == ("pending", True)


def test_a_server_on_its_own_ends_at_the_warning_to_come_back(job) -> None:
    it = job(("serve",))
    it.slurm_says(RUNNING)
    assert it.signalled(signal.SIGUSR2)
    assert (it.state.state, it.queued_again) == ("pending", True)


def test_a_warned_server_serves_on_where_slurm_does_not_say_what_comes(job) -> None:
    it = job(("serve",))
    it.slurm_says("echo 'Unable to contact slurm controller'; exit 1")
    assert not it.signalled(signal.SIGUSR2)


def test_a_controller_that_comes_back_is_told_to_queue_the_saved_training_again(job, monkeypatch) -> None:
    monkeypatch.setattr(ending, "_PAUSES_S", (0.0, 0.0, 0.0))
    it = job()
    away = f"[ $(grep -c requeue {it.run.root}/bin/calls) -gt 2 ] || {{ echo 'Unable to contact it'; exit 1; }}"
    it.slurm_says(RUNNING, requeue=away)
    it.signalled(signal.SIGUSR2)
    it.ending.settle(SAVED)
    assert (it.state.state, it.calls.read_text().count("requeue 7")) == ("pending", 3)


def test_a_preemption_that_cancels_is_undone(job) -> None:
    it = job(("sft",))
    it.slurm_says(f"JobState=COMPLETING PreemptTime={at(0)}")
    assert it.signalled(signal.SIGTERM)
    assert (it.state.state, it.state.attempt, it.queued_again) == ("pending", 1, True)


def test_a_job_whose_work_was_just_done_is_queued_again_to_say_so(job) -> None:
    it = job(("sft",))
    it.slurm_says(OUT_OF_TIME)
    set_state(it.run, "sft", "s1", "done", attempt=1)
    assert it.signalled(signal.SIGTERM)
    assert (it.state.state, it.queued_again) == ("pending", True)


def test_a_script_that_has_no_business_here_leaves_the_live_jobs_request_alone(job) -> None:
    it = job()
    it.slurm_says(RUNNING)
    it.signalled(signal.SIGUSR2)
    other = Ending(it.run, "s1", TRAINING)
    other.listen()
    assert it.run.stop_flag.exists()
    other.begin()  # it is the job now
    assert not it.run.stop_flag.exists()


def test_scancel_ends_the_job_for_good(job) -> None:
    it = job()
    it.slurm_says("JobState=CANCELLED")
    assert it.signalled(signal.SIGTERM)
    assert (it.state.state, it.state.reason) == ("cancelled", "the job was asked to end")


def test_a_controller_that_does_not_say_why_the_job_ends_leaves_its_state_open(job, monkeypatch) -> None:
    it = job()
    monkeypatch.setattr(ending, "_ASK_S", 0.2)
    for silence in ("exec sleep 5", "echo 'Unable to contact slurm controller'; exit 1"):
        it.slurm_says(silence)
        signal.signal(signal.SIGTERM, it.ending._on_term)
        assert it.signalled(signal.SIGTERM)
        assert (it.state.state, it.queued_again) == ("running", False)


def test_a_time_limit_is_a_segment_while_the_training_gets_further(job) -> None:
    it = job()
    it.slurm_says(OUT_OF_TIME)
    it.reached(8)
    assert it.signalled(signal.SIGTERM)
    assert (it.state.state, it.queued_again) == ("pending", True)


@pytest.mark.parametrize("names", [TRAINING, ("sft",)])
def test_a_time_limit_in_which_nothing_was_reached_is_a_failure(job, names) -> None:
    it = job(names)
    it.slurm_says(OUT_OF_TIME)
    assert it.signalled(signal.SIGTERM)
    assert (it.state.state, it.queued_again) == ("failed", False)
    assert it.state.reason.startswith("it reached its time limit; raise time_min")


def test_a_training_warned_before_its_first_update_does_not_try_the_same_again(job) -> None:
    it = job()
    it.slurm_says(LATE)
    assert not it.signalled(signal.SIGUSR2)
    it.ending.settle(SAVED)
    assert (it.state.state, it.queued_again) == ("failed", False)
    assert (
        it.state.reason == "its time limit left no time to train; raise time_min for its stage in the cluster profile"
    )
    assert not it.run.stop_flag.exists()


def test_where_retries_are_allowed_it_asks_for_more_time(job) -> None:
    it = job(retries=1)
    it.slurm_says(f"{LATE} TimeLimit=01:00:00")
    it.signalled(signal.SIGUSR2)
    it.ending.settle(SAVED)
    assert it.state.reason == "retry 1 of 1 with 90 min: its time limit left no time to train"
    assert it.calls.read_text().splitlines()[-1] == "scontrol update JobId=7 TimeLimit=90"


@pytest.mark.parametrize(
    ("said", "step"),
    [(PREEMPTED, 4), (LATE, 8), (RUNNING, 4), (":", 4)],
    ids=["preempted", "further", "early", "silence"],
)
def test_a_training_that_got_further_or_was_preempted_goes_on_later(job, said: str, step: int) -> None:
    it = job()
    it.slurm_says(said)
    it.signalled(signal.SIGUSR2)
    if step > 4:
        it.reached(step)
    it.ending.settle(SAVED)
    assert (it.state.state, it.queued_again) == ("pending", True)


def test_a_person_who_asks_for_a_stop_is_obeyed(job) -> None:
    it = job()
    it.slurm_says(RUNNING)
    it.run.stop_flag.parent.mkdir(exist_ok=True)
    it.run.stop_flag.write_text("")
    it.ending.settle(SAVED)
    assert (it.state.state, it.run.stop_flag.exists()) == ("stopped", True)


def test_a_requeue_never_undoes_a_scancel_that_came_meanwhile(job) -> None:
    it = job()
    it.slurm_says(LATE)
    it.signalled(signal.SIGUSR2)
    it.reached(8)
    it.slurm_says("JobState=COMPLETING Reason=None")
    it.ending.settle(SAVED)
    assert (it.state.state, it.queued_again) == ("stopped", False)
    assert "job 7 is being ended, by scancel or by its node" in it.state.reason


def test_a_site_that_forbids_requeueing_is_named_by_the_state(job) -> None:
    it = job()
    it.slurm_says(RUNNING, requeue="echo 'Requested operation is presently disabled'; exit 1")
    it.signalled(signal.SIGUSR2)
    it.ending.settle(SAVED)
    for stage in TRAINING:
        recorded = recorded_state(it.run, stage)
        assert recorded is not None
        assert (recorded.state, "presently disabled; submit again to go on" in recorded.reason) == ("stopped", True)
