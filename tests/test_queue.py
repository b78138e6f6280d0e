"""What Slurm says of a job in its queue is shown in words; what it says otherwise than expected breaks nothing."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_states import _no_memory, fake_slurm, run  # noqa: F401

from pipeline import cancel
from pipeline.errors import UserError
from pipeline.follow import follow
from pipeline.run import atomic
from pipeline.run.directory import RunDir
from pipeline.scheduler import submission as submissions
from pipeline.scheduler import view
from pipeline.scheduler.queue import Queued, describe, parse
from pipeline.scheduler.state import set_state
from pipeline.scheduler.submission import Job, Submission
from pipeline.scheduler.table import render_line, render_table
from pipeline.scheduler.view import view_run
from pipeline.stages import job


@pytest.fixture(autouse=True)
def _nothing_found_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "_found", {})


def test_a_line_of_squeue_is_read_field_by_field() -> None:
    job = parse("12|RUNNING|None|n[1-2]|2026-11-25T10:26:39|1-02:03:04|UNLIMITED")
    assert (job.job_id, job.state, job.nodes, job.left_s) == ("12", "RUNNING", "n[1-2]", None)
    assert job.used_s == ((24 + 2) * 60 + 3) * 60 + 4
    assert time.strftime("%H:%M:%S", time.localtime(job.start)) == "10:26:39"
    assert parse("12|PENDING|Dependency||N/A|0:00|30:00") == Queued(
        "12", "PENDING", "Dependency", used_s=0, left_s=1800
    )


@pytest.mark.parametrize("line", ["", "12", "12|RUNNING", "12|RUNNING|||yesterday|x|-1", "12|NEW_STATE|a|b|c|d|e|f|g"])
def test_a_malformed_line_is_no_error(line: str) -> None:
    job = parse(line)
    assert job.job_id == line.partition("|")[0]
    assert not job.stuck
    assert describe(job).startswith(f"job {job.job_id}")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("7|PENDING|Priority||N/A|0:00|30:00", "job 7 waits behind others (Priority)"),
        (
            "7|PENDING|Resources||2026-11-25T14:05:00|0:00|30:00",
            "job 7 waits for free nodes (Resources), expected 14:05",
        ),
        (
            "7|PENDING|Resources||2026-11-26T14:05:00|0:00|30:00",
            "job 7 waits for free nodes (Resources), expected Nov 26 14:05",
        ),
        ("7|PENDING|Dependency||N/A|0:00|30:00", "job 7 waits for the jobs before it (Dependency)"),
        (
            "7_2|PENDING|JobArrayTaskLimit||N/A|0:00|30:00",
            "job 7_2 waits until fewer points of its sweep run (JobArrayTaskLimit)",
        ),
        ("7|PENDING|AssocGrpGRES||N/A|0:00|30:00", "job 7 waits for a limit of its account or QoS (AssocGrpGRES)"),
        ("7|PENDING|SomethingNew||N/A|0:00|30:00", "job 7 waits (SomethingNew)"),
        ("7|RUNNING|None|n1|2026-11-25T10:00:00|5:00|54:59", "job 7 on n1, 54 min left"),
        ("7|RUNNING|None|n1|2026-11-25T10:00:00|5:00|1-01:02:00", "job 7 on n1, 25 h 02 min left"),
        ("7|COMPLETING|None|n1|2026-11-25T10:00:00|5:00|54:59", "job 7 on n1, ending"),
        ("7|SUSPENDED|None|n1|2026-11-25T10:00:00|5:00|54:59", "job 7 on n1, suspended by Slurm"),
        ("7|STAGE_OUT|None|n1|2026-11-25T10:00:00|5:00|54:59", "job 7 on n1, its data is moved"),
        ("7|NEW_STATE|None|n1|2026-11-25T10:00:00|5:00|54:59", "job 7 on n1, new_state"),
    ],
)
def test_a_job_that_will_go_on_is_described(line: str, said: str) -> None:
    now = time.mktime(time.strptime("2026-11-25 12:00", "%Y-%m-%d %H:%M"))
    assert (describe(parse(line), now), parse(line).stuck) == (said, False)


@pytest.mark.parametrize(
    ("state", "reason", "remedy"),
    [
        ("PENDING", "JobHeldUser", "scontrol release 7"),
        ("PENDING", "job requeued in held state", "scontrol release 7"),
        ("PENDING", "launch failed requeued held", "scontrol release 7"),
        ("PENDING", "JobHeldAdmin", "ask them why"),
        ("PENDING", "DependencyNeverSatisfied", "cancel and submit again"),
        ("PENDING", "BadConstraints", "correct the profile's constraint"),
        ("PENDING", "PartitionTimeLimit", "lower its time_min"),
        ("PENDING", "QOSMaxWallDurationPerJobLimit", "lower its time_min"),
        ("PENDING", "AssocMaxWallDurationPerJobLimit", "lower its time_min"),
        ("PENDING", "AssocMaxCpuPerJobLimit", "cancel and submit again"),
        ("PENDING", "PartitionNodeLimit", "lower its nodes"),
        ("PENDING", "InvalidQOS", "correct account and qos"),
        ("REQUEUE_HOLD", "None", "scontrol release 7"),
        ("SPECIAL_EXIT", "None", "scontrol release 7"),
        ("RESV_DEL_HOLD", "None", "correct cluster.reservation"),
    ],
)
def test_a_job_that_would_wait_for_ever_is_shown_with_what_to_do(state: str, reason: str, remedy: str) -> None:
    job = parse(f"7|{state}|{reason}||N/A|0:00|30:00")
    assert job.stuck
    assert remedy in describe(job)


def slurm_run(run: RunDir, *ids: str | None) -> Submission:  # noqa: F811
    jobs = [Job((stage,), job_id=job) for stage, job in zip(("sft", "convert", "evaluate"), ids, strict=False)]
    submission = Submission(
        "20260101-000000-abcd", "slurm", tuple(jobs), time=time.time() - submissions.SUBMITTING_S - 1
    )
    submissions.write(run, submission)
    return submission


def test_the_table_shows_jobs_nodes_and_reasons_within_the_terminal(run, tmp_path, monkeypatch) -> None:  # noqa: F811
    lines = [
        "7|RUNNING|None|n1|2026-11-25T10:00:00|5:00|54:59",
        "8|PENDING|Dependency||N/A|0:00|30:00",
        "9|PENDING|JobHeldUser||N/A|0:00|30:00",
    ]
    calls = fake_slurm(monkeypatch, tmp_path, squeue="cat <<'END'\n" + "\n".join(lines) + "\nEND")
    submission = slurm_run(run, "7", "8", "9")
    set_state(run, "sft", submission.id, "running", "first run", attempt=1)
    atomic.write_json(run.attempt("sft", 1) / "job.json", {"slurm_restart_count": "2"})
    views = view_run(run, submission)
    sft, convert, evaluate = render_table(views, colour=False, width=100).splitlines()
    assert "job 7 on n1, 54 min left, restart 2" in sft
    assert "job 8 waits for the jobs before it (Dependency)" in convert
    assert evaluate.endswith("job 9 is held (JobHeldUser); let it go on with: scontrol release 9")
    assert [view.stuck for view in views] == [False, False, True]
    assert all(len(line) <= 60 for line in render_table(views[:2], colour=False, width=60).splitlines())
    assert render_line(views[2], colour=False, width=60).endswith("release 9")  # what has to be acted on is not cut
    view_run(run, submission)
    assert len(calls.read_text().splitlines()) == 1


def test_a_stage_that_has_ended_says_nothing_of_its_job(run, tmp_path, monkeypatch) -> None:  # noqa: F811
    fake_slurm(monkeypatch, tmp_path, squeue="echo '7|COMPLETING|None|n1|2026-11-25T10:00:00|5:00|54:59'")
    submission = slurm_run(run, "7")
    set_state(run, "sft", submission.id, "done", "loss 1.0", attempt=1)
    (shown,) = view_run(run, submission)
    assert (shown.queue, shown.detail) == ("", "loss 1.0")


def test_who_follows_is_told_once_of_a_job_that_is_stuck(run, tmp_path, monkeypatch, capsys) -> None:  # noqa: F811
    monkeypatch.setattr(submissions, "SLURM_S", 0.0)
    squeue = f"[ $(wc -l < {tmp_path}/calls) -gt 3 ] || echo '7|PENDING|JobHeldUser||N/A|0:00|30:00'"
    fake_slurm(monkeypatch, tmp_path, squeue=squeue, scontrol="exit 1", sacct="exit 1")
    views = follow(run, slurm_run(run, "7"))
    assert [view.state for view in views] == ["failed"]
    held, died = capsys.readouterr().out.splitlines()
    assert held.endswith("job 7 is held (JobHeldUser); let it go on with: scontrol release 7")
    assert "died (job 7)" in died


def scripts(run: RunDir, *jobs: tuple[str, str]) -> str:  # noqa: F811
    """A squeue that answers to %i|%o with these jobs' scripts, and to the other question that they wait."""
    rows = "\n".join(f"{job}|{run.root}/jobs/{folder}/.submission_file_0a.sh" for job, folder in jobs)
    ids = "\n".join(f"{job}|PENDING|Priority||N/A|0:00|30:00" for job, _ in jobs)
    return f"case \"$*\" in *%o*) cat <<'END'\n{rows}\n5|(null)\nEND\n;; *) cat <<'END'\n{ids}\nEND\n;; esac"


def test_jobs_that_a_killed_submitter_could_not_record_are_found(run, tmp_path, monkeypatch) -> None:  # noqa: F811
    submission = slurm_run(run, "7", None, None)
    others = ("11", f"{submission.id}-evaluate-not"), ("12", "20260101-000000-ffff-convert")
    squeue = scripts(run, ("7", f"{submission.id}-sft"), ("8", f"{submission.id}-convert"), *others)
    calls = fake_slurm(monkeypatch, tmp_path, squeue=squeue, scancel="")
    shown = {each.stage: each for each in view_run(run, submission)}
    assert (shown["convert"].job_id, shown["convert"].queue) == ("8", "job 8 waits behind others (Priority)")
    assert (shown["evaluate"].state, shown["evaluate"].detail) == ("failed", "was never submitted")
    assert submissions.read(run) == submission  # looking writes nothing
    submissions.recover(run)
    assert submissions.read(run) == submission.with_job(replace(submission.jobs[1], job_id="8"))
    assert submissions.busy(run) is not None
    assert cancel.cancel(run, grace_s=0) == ["sft", "convert"]
    assert "scancel 7 8\n" in calls.read_text()


def test_a_job_that_no_record_knows_records_itself_when_it_starts(run, monkeypatch) -> None:  # noqa: F811
    submission = slurm_run(run, "7", None)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    job._adopt(run, submission, ("convert",))
    recorded = submissions.read(run)
    assert recorded is not None
    assert [each.job_id for each in recorded.jobs] == ["7", "8"]


def test_nothing_is_submitted_while_slurm_cannot_say_what_is_queued(run, tmp_path, monkeypatch) -> None:  # noqa: F811
    fake_slurm(monkeypatch, tmp_path, squeue="echo 'slurm_load_jobs error: Socket timed out'; exit 1")
    slurm_run(run, None)
    with pytest.raises(UserError, match=r"squeue: .*Socket timed out; what the last submission queued is not known"):
        submissions.recover(run)
    assert view_run(run)[0].state == "failed"


def test_accounting_is_asked_for_old_jobs_too(run, tmp_path, monkeypatch) -> None:  # noqa: F811
    calls = fake_slurm(monkeypatch, tmp_path, squeue="exit 0", scontrol="exit 1", sacct="echo TIMEOUT")
    submission = replace(slurm_run(run, "97"), time=1760000000.0)
    assert "it reached its time limit" in view_run(run, submission)[0].detail
    start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(1760000000))
    assert f"-j 97 --starttime={start}" in calls.read_text()


def test_a_file_that_another_node_has_just_made_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS: the name is remembered as missing until its folder is listed. A simulation, not NFS."""
    atomic.write_json(tmp_path / "outputs.json", {"a": 1})
    real, listed = Path.read_text, []
    monkeypatch.setattr(atomic.os, "listdir", lambda path: listed.append(path) or ["outputs.json"])

    def read(path: Path, *arguments: str) -> str:
        if not listed:
            raise FileNotFoundError(path)
        return real(path, *arguments)

    monkeypatch.setattr(Path, "read_text", read)
    assert atomic.read_json(tmp_path / "outputs.json") == {"a": 1}
    assert listed == [tmp_path]
