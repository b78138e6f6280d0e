"""States are worked out from what is known, and what is not known is not made up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers_jobs import FORGOTTEN, fake_slurm

from pipeline import cancel, logs, procs
from pipeline.errors import UserError
from pipeline.run import atomic
from pipeline.run.directory import Outputs, RunDir
from pipeline.scheduler import queue, slurm
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.state import resolve, set_state
from pipeline.scheduler.submission import Job, Submission


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    atomic.write_text(tmp_path / "config.yaml", "preset: demo\n")
    return RunDir(tmp_path)


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submissions, "_asked", {})
    monkeypatch.setattr(submissions, "_runs", {})
    monkeypatch.setattr(slurm, "_ends", {})


def local(process: procs.ProcessId) -> Submission:
    return Submission("s1", "local", (Job(("sft",), job_id="7", process=process),))


DEAD = procs.ProcessId(os.uname().nodename, 1, 1, "an earlier boot")


def test_a_job_that_is_gone_without_a_word_has_failed(run: RunDir) -> None:
    set_state(run, "sft", "s1", "running", attempt=1)
    state = resolve(run, local(DEAD), "sft")
    assert (state.state, state.attempt) == ("failed", 1)
    assert state.reason == "died (job 7): it was killed or lost its node"
    assert resolve(run, local(procs.this_process()), "sft").state == "running"


def test_what_a_stage_said_of_its_end_stands(run: RunDir) -> None:
    set_state(run, "sft", "s1", "done", "loss 1.0", attempt=1)
    assert resolve(run, local(DEAD), "sft").state == "done"


def test_a_state_of_an_earlier_submission_says_nothing_of_this_one(run: RunDir) -> None:
    set_state(run, "sft", "s0", "done")
    assert resolve(run, local(procs.this_process()), "sft").state == "pending"


def test_when_slurm_does_not_answer_nothing_is_made_up(run, tmp_path, monkeypatch) -> None:
    calls = fake_slurm(
        monkeypatch,
        tmp_path,
        squeue="echo 'slurm_load_jobs error: Unable to contact slurm controller'; exit 1",
        scancel="",
    )
    submission = Submission("s1", "slurm", (Job(("sft",), job_id="7"), Job(("train",), ("sft",), job_id="8")))
    submissions.write(run, submission)
    set_state(run, "sft", "s1", "running", attempt=1)
    assert resolve(run, submission, "sft").state == "running"
    assert submissions.busy(run) == submission  # nothing is submitted beside it
    assert cancel.cancel(run, grace_s=0) == ["sft", "train"]
    assert "scancel 7 8" in calls.read_text()


def test_a_controller_that_is_silent_for_long_has_not_ended_the_jobs(monkeypatch) -> None:
    def silent(argv: list[str]) -> tuple[int, str]:
        raise procs.NoAnswer("squeue: no answer within 60 s")

    monkeypatch.setattr(procs, "capture", silent)
    assert set(queue.ask(["7", "8"])) == {"7", "8"}


def test_slurm_is_asked_once_for_all_jobs_and_then_left_alone(run, tmp_path, monkeypatch) -> None:
    calls = fake_slurm(monkeypatch, tmp_path, squeue="echo 8", scontrol=FORGOTTEN)
    submission = Submission("s1", "slurm", (Job(("sft",), job_id="7"), Job(("train",), ("sft",), job_id="8")))
    for _ in range(20):
        assert resolve(run, submission, "sft").state == "failed"  # not in the queue, and never said how it ended
        assert resolve(run, submission, "train").state == "pending"
    asked = [line for line in calls.read_text().splitlines() if not line.startswith("sacct")]
    assert asked == [f"squeue --noheader --array --format={queue.FIELDS} --jobs=7,8", "scontrol --oneliner show job 7"]


def test_jobs_that_slurm_has_forgotten_are_over(run, tmp_path, monkeypatch) -> None:
    fake_slurm(monkeypatch, tmp_path, squeue=FORGOTTEN)
    assert queue.ask(["7", "8"]) == {}


def test_jobs_on_another_host_are_cancelled_there_and_nothing_is_killed_here(run: RunDir) -> None:
    submissions.write(run, local(procs.ProcessId("another-host", os.getppid(), 1, "boot")))
    with pytest.raises(UserError, match=r"its jobs are processes of another-host; run pipeline.cancel there"):
        cancel.cancel(run, grace_s=0)


def test_following_a_log_ends_when_its_job_is_gone(run: RunDir) -> None:
    submissions.write(run, local(DEAD))
    set_state(run, "sft", "s1", "running", attempt=1)
    assert logs.has_ended(run, "sft")


def test_what_slurm_says_of_a_jobs_end_is_the_reason(run, tmp_path, monkeypatch) -> None:
    fake_slurm(monkeypatch, tmp_path, squeue="exit 0", scontrol="echo JobId=91 JobName=hh-sft JobState=OUT_OF_MEMORY")
    submission = Submission("s1", "slurm", (Job(("sft",), job_id="91"), Job(("train",), ("sft",), job_id="92")))
    state = resolve(run, submission, "sft")
    assert state.reason == "died (job 91): it ran out of memory; raise mem_gb for its stage in the cluster profile"
    waiting = resolve(run, submission, "train")  # Slurm ended it, since what it waits for failed
    assert (waiting.state, waiting.reason) == ("cancelled", "sft failed")


def test_accounting_answers_where_the_controller_has_forgotten(run, tmp_path, monkeypatch) -> None:
    fake_slurm(monkeypatch, tmp_path, squeue="exit 0", scontrol=FORGOTTEN, sacct="echo 'CANCELLED by 1000'")
    submission = Submission("s1", "slurm", (Job(("sft",), job_id="93"),))
    state = resolve(run, submission, "sft")
    assert (state.state, state.reason) == ("cancelled", "job 93: it was cancelled by scancel")


def test_a_controller_that_says_nothing_ends_no_job(run, tmp_path, monkeypatch) -> None:
    silence = "echo 'Unable to contact slurm controller (connect failure)'; exit 1"
    fake_slurm(monkeypatch, tmp_path, squeue="exit 0", scontrol=silence)
    set_state(run, "sft", "s1", "running", attempt=1)
    submission = Submission("s1", "slurm", (Job(("sft",), job_id="95"),))
    assert resolve(run, submission, "sft").state == "running"
    fake_slurm(monkeypatch, tmp_path, scontrol="echo JobId=95 JobState=NODE_FAIL")
    assert resolve(run, submission, "sft").reason == "died (job 95): its node failed"


def test_a_job_that_ended_before_its_work_began_is_explained_by_its_log(run, tmp_path, monkeypatch) -> None:
    fake_slurm(monkeypatch, tmp_path, squeue="exit 0", scontrol="echo JobId=96 JobState=FAILED ExitCode=1:0")
    submission = Submission("s1", "slurm", (Job(("sft",), job_id="96"),))
    atomic.write_text(run.root / "jobs" / "s1-sft" / "96_0_log.err", "Lmod has detected ...\nno module cuda/99\n\n")
    state = resolve(run, submission, "sft")
    assert (state.state, state.reason) == ("failed", "its job 96 ended before its work began: no module cuda/99")
    atomic.write_text(run.root / "jobs" / "s1-sft" / "96_0_log.err", "srun: error: n1: task 0: Killed\n")
    assert resolve(run, submission, "sft").reason == "died (job 96): it was killed or lost its node"


def test_a_job_killed_after_it_had_written_its_outputs_is_done(run, tmp_path, monkeypatch) -> None:
    fake_slurm(monkeypatch, tmp_path, squeue="exit 0", scontrol="echo JobId=97 JobState=FAILED")
    submission = Submission("s1", "slurm", (Job(("sft",), job_id="97"),))
    set_state(run, "sft", "s1", "running", attempt=2)
    run.write_outputs(Outputs("sft", "f", 1, {}, {}))
    assert resolve(run, submission, "sft").state == "failed"  # these are an earlier attempt's
    run.write_outputs(Outputs("sft", "f", 2, {}, {}))
    assert resolve(run, submission, "sft").state == "done"


def in_allocation(restart: int) -> Submission:
    elsewhere = procs.ProcessId("a-node", 4, 1, "its boot")
    jobs = (Job(("sft",), job_id="4", process=elsewhere),)
    return Submission("s1", "allocation", jobs, allocation="71", restart=restart)


def test_jobs_inside_an_allocation_live_as_long_as_that_start_of_it(run, tmp_path, monkeypatch) -> None:
    said = "echo JobId=71 BatchFlag=1 JobState=RUNNING Restarts=1"
    fake_slurm(monkeypatch, tmp_path, squeue="echo 71", scontrol=said)
    set_state(run, "sft", "s1", "running", attempt=1)
    assert resolve(run, in_allocation(1), "sft").state == "running"
    assert resolve(run, in_allocation(0), "sft").state == "failed"  # of before it was requeued


def test_jobs_inside_an_allocation_that_waits_again_are_over(run, tmp_path, monkeypatch) -> None:
    fake_slurm(monkeypatch, tmp_path, squeue="echo 71", scontrol="echo JobId=71 JobState=PENDING Restarts=0")
    submissions.write(run, in_allocation(0))
    assert submissions.busy(run) is None  # the next start submits


def test_an_allocation_is_cancelled_from_elsewhere_by_its_own_job(run, tmp_path, monkeypatch) -> None:
    calls = fake_slurm(
        monkeypatch,
        tmp_path,
        squeue="test -f cancelled || echo 71",
        scontrol="echo JobId=71 BatchFlag=1 JobState=RUNNING Restarts=0",
        scancel=f"touch {tmp_path}/cancelled",
    )
    monkeypatch.chdir(tmp_path)
    submissions.write(run, in_allocation(0))
    set_state(run, "sft", "s1", "running", attempt=1)
    assert cancel.cancel(run, grace_s=20) == ["sft"]
    assert "scancel 71" in calls.read_text()
    assert resolve(run, in_allocation(0), "sft").state == "cancelled"


def test_the_shell_of_an_interactive_allocation_is_not_cancelled(run, tmp_path, monkeypatch) -> None:
    shown = "echo JobId=71 BatchFlag=0 JobState=RUNNING Restarts=0"
    calls = fake_slurm(monkeypatch, tmp_path, squeue="echo 71", scontrol=shown, scancel="")
    submissions.write(run, in_allocation(0))
    with pytest.raises(UserError, match=r"its jobs are processes of a-node; run pipeline.cancel there"):
        cancel.cancel(run, grace_s=0)
    assert "scancel" not in calls.read_text()
