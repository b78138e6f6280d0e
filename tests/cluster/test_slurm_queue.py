"""What status says of jobs in a real Slurm's queue, and jobs whose submitter died before it could record them."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_cluster import CHAIN_SETTINGS, profile, separate, states
from helpers_jobs import command, nothing_left, start, submit, until_training, wait_for
from mini_slurm import MiniSlurm

from pipeline.run.directory import RunDir
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.submission import SUBMITTING_S
from pipeline.scheduler.view import view_run

pytestmark = pytest.mark.slurm


def line_of(run: Path, stage: str) -> str:
    """The stage's line of the status table."""
    lines = command("status", run).out.splitlines()
    return next((line for line in lines if line[2:].startswith(f"{stage} ")), "")


def queued(run: Path, stage: str) -> str:
    """Where the stage's job is, as Slurm says now."""
    submissions._asked.clear()
    return next(view.queue for view in view_run(RunDir(run)) if view.stage == stage)


def test_held_waiting_running_and_cancelled_jobs_are_told_apart(slurm: MiniSlurm, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    held = profile(slurm.folder, "held", extra={"hold": True}, setup=["sleep 60"])
    stages = ("--stage", "prefetch,sft", "--no-follow", "--cluster", held)
    done = submit(run, *stages, overrides=CHAIN_SETTINGS)
    assert done.status == 0, done.err
    first, second = slurm.job_ids()
    assert line_of(run, "prefetch").endswith(
        f"job {first} is held (JobHeldUser); let it go on with: scontrol release {first}"
    )
    assert line_of(run, "sft").endswith(f"scontrol release {second}")
    slurm.command("scontrol", "release", second)
    waits = f"job {second} waits for the jobs before it (Dependency)"  # which Slurm says once it has looked at it
    wait_for(lambda: queued(run, "sft") == waits, "the reason", 60)
    assert line_of(run, "sft").endswith(waits)
    slurm.command("scontrol", "release", first)
    runs = f"job {first} on n1, 29 min left"
    wait_for(lambda: queued(run, "prefetch") == runs, "the first job to run", 60)
    assert runs in line_of(run, "prefetch")
    slurm.command("scancel", first)
    wait_for(slurm.empty, "Slurm to end both")
    assert f"job {first}: it was cancelled by scancel" in line_of(run, "prefetch")
    assert line_of(run, "sft").endswith("prefetch cancelled")


def test_a_job_asking_for_more_than_the_partition_gives_is_shown_as_stuck(slurm: MiniSlurm, tmp_path: Path) -> None:
    slurm.command("scontrol", "update", "PartitionName=gpu", "MaxTime=10")
    try:
        done = submit(
            tmp_path / "run",
            *("--stage", "prefetch", "--no-follow", "--cluster", profile(slurm.folder, "long")),
            overrides=CHAIN_SETTINGS,
        )
        assert done.status == 0, done.err
        wait_for(lambda: "PartitionTimeLimit" in queued(tmp_path / "run", "prefetch"), "Slurm's reason")
        assert "asks for more time than it can get (PartitionTimeLimit); lower its time_min" in line_of(
            tmp_path / "run", "prefetch"
        )
        assert "cancelled prefetch" in command("cancel", tmp_path / "run").out
        assert slurm.empty()
    finally:
        slurm.command("scontrol", "update", "PartitionName=gpu", "MaxTime=INFINITE")


def deadly_sbatch(folder: Path, at: int) -> dict[str, str]:
    """An environment whose sbatch is the real one, and whose call number `at` kills its submitter, having queued."""
    real, count = shutil.which("sbatch"), folder / "calls"
    folder.mkdir()
    (folder / "sbatch").write_text(
        f"#!/bin/bash\n{real} \"$@\" || exit\necho >> '{count}'\n"
        f"[ $(wc -l < '{count}') -lt {at} ] && exit\n"
        "for pid in $PPID $(sed -n 's/^PPid:\\t//p' /proc/$PPID/status); do\n"
        "    grep --quiet pipeline.submit /proc/$pid/cmdline && kill -9 $pid\n"
        "done\n"
    )
    (folder / "sbatch").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_a_job_that_its_submitter_could_not_record_is_found_and_not_repeated(slurm: MiniSlurm, tmp_path: Path) -> None:
    run = tmp_path / "it's a run"
    held = profile(slurm.folder, "held", extra={"hold": True})
    stages = ("--stage", "prefetch,sft,reward-model", "--no-follow", "--cluster", held)
    submitted = submit(run, *stages, overrides=CHAIN_SETTINGS, env=deadly_sbatch(tmp_path / "bin", at=2))
    assert submitted.status == -9
    first, second = slurm.job_ids()
    recorded = submissions.read(RunDir(run))
    assert recorded is not None
    assert [job.job_id for job in recorded.jobs] == [first, None, None]
    submissions.write(RunDir(run), replace(recorded, time=recorded.time - SUBMITTING_S))
    assert f"job {second} is held" in line_of(run, "sft")
    again = submit(run, *stages, overrides=CHAIN_SETTINGS)
    assert (again.status, "are running already" in again.out) == (0, True), again.err
    assert slurm.job_ids() == [first, second]
    recorded = submissions.read(RunDir(run))
    assert recorded is not None
    assert [job.job_id for job in recorded.jobs] == [first, second, None]
    assert "cancelled prefetch, sft" in command("cancel", run).out
    assert slurm.empty()


@pytest.mark.triton
@pytest.mark.chain
def test_cancel_reaches_the_server_job_and_what_waits_for_it(slurm: MiniSlurm, finished: Path, tmp_path: Path) -> None:
    run = until_training(finished, tmp_path / "run")
    arguments = ("--stage", "serve,train,evaluate", "--cluster", separate(slurm.folder))
    follower = start(run, *arguments, overrides=CHAIN_SETTINGS)
    wait_for(lambda: "TRITON_HOST=" in states(run).get("serve", ("", ""))[1], "the server", 120)
    line = line_of(run, "serve")
    assert "TRITON_HOST=" in line and " on n" in line
    assert "cancelled serve, train, evaluate" in command("cancel", run).out
    assert slurm.empty()
    assert follower.wait(120) == 1
    wait_for(lambda: nothing_left(run), "every process to end", 30)
