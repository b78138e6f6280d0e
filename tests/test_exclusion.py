"""A node that one job finds broken is left out by those that wait in the queue already."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from helpers_jobs import fake_slurm

from pipeline.run.directory import RunDir
from pipeline.scheduler import exclusion
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.submission import Job, Submission

SHOWN = {
    "7": "JobState=RUNNING NumNodes=1 ExcNodeList=(null)",
    "8": "JobState=PENDING NumNodes=1 ExcNodeList=n[4-5]",
    "9": "JobState=PENDING NumNodes=3-3 ExcNodeList=(null)",
    "10": "JobState=RUNNING NumNodes=1 ExcNodeList=(null)",
    "11": "JobState=PENDING NumNodes=1 ExcNodeList=(null)",
}
SCONTROL = """
case "$1 $2" in
    "--oneliner show") {shown}; true;;
    "show hostnames") [ "$3" = "n[4-5]" ] && echo "n4 n5" || echo "$3" | tr , '\\n';;
    "update JobId=8") {refusal};;
esac
"""


def queue(monkeypatch: pytest.MonkeyPatch, folder: Path, refusal: str = ":") -> tuple[RunDir, Path]:
    """Job 7 of a chain runs, as this process, and another one; the others wait. There are three nodes."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    shown = "; ".join(f'[ "$4" = {job} ] && echo "JobId={job} Partition=gpu {said}"' for job, said in SHOWN.items())
    scontrol = SCONTROL.format(shown=shown, refusal=refusal)
    sinfo = "for node in n1 n2 n3; do echo $node 512000 infinite; done"
    calls = fake_slurm(monkeypatch, folder, scontrol=scontrol, sinfo=sinfo)
    stages = ("prefetch", "sft", "train", "sandbox", "evaluate")
    jobs = tuple(Job((stage,), job_id=job) for stage, job in zip(stages, SHOWN, strict=True))
    run = RunDir(folder)
    submissions.write(run, Submission("s1", "slurm", (*jobs, Job(("convert",)))))
    return run, calls


def updates(calls: Path) -> list[str]:
    return [line.removeprefix("scontrol update ") for line in calls.read_text().splitlines() if " update " in line]


def test_waiting_jobs_avoid_it_beside_what_they_avoid_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = queue(monkeypatch, tmp_path)
    exclusion.avoid(run, "s1", "n1")
    # Job 9 needs all three nodes: without one of them it would wait for ever.
    assert updates(calls) == ["JobId=8 ExcNodeList=n1,n4,n5", "JobId=11 ExcNodeList=n1"]


def test_a_job_that_slurm_does_not_change_is_named_in_the_log_and_the_others_are_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, calls = queue(monkeypatch, tmp_path, refusal="echo 'Job is no longer pending execution'; exit 1")
    with caplog.at_level(logging.WARNING):
        exclusion.avoid(run, "s1", "n1")
    assert "job 8 may still run on a broken node: scontrol update" in caplog.text
    assert updates(calls)[-1] == "JobId=11 ExcNodeList=n1"


def test_what_a_job_avoids_already_is_not_forgotten_when_slurm_does_not_say_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(SHOWN, "8", "JobState=PENDING NumNodes=1 ExcNodeList=n[4")
    run, calls = queue(monkeypatch, tmp_path)
    (tmp_path / "scontrol").write_text((tmp_path / "scontrol").read_text().replace('echo "$3" | tr', "exit 1; tr"))
    exclusion.avoid(run, "s1", "n1")
    assert updates(calls) == ["JobId=11 ExcNodeList=n1"]
    assert "job 8 may still run on a broken node" in caplog.text


def test_a_node_that_is_forgiven_is_allowed_again_but_for_what_the_profile_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = queue(monkeypatch, tmp_path)
    exclusion.allow(run, "s1", ["n1", "n4", "n5"], kept=["n5"])
    assert updates(calls) == ["JobId=8 ExcNodeList=n5"]


def test_a_controller_that_is_away_is_asked_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, _ = queue(monkeypatch, tmp_path)
    calls = fake_slurm(monkeypatch, tmp_path, scontrol="echo 'Unable to contact slurm controller'; exit 1")
    exclusion.avoid(run, "s1", "n1")
    assert calls.read_text().count("scontrol") == 1
    assert "may still run on a broken node" in caplog.text


def test_another_submission_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = queue(monkeypatch, tmp_path)
    exclusion.avoid(run, "s0", "n1")
    assert not calls.exists()
