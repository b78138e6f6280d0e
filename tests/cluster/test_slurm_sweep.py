"""Points of a sweep as job arrays on a real Slurm: each task keeps its identity, whatever becomes of the others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from helpers_cluster import CHAIN_SETTINGS, PROFILE
from helpers_jobs import command, pids_running, submit, wait_for
from mini_slurm import MiniSlurm

from pipeline.run import atomic
from pipeline.run.directory import RunDir
from pipeline.scheduler import submission as submissions

pytestmark = [pytest.mark.slurm]

SLOW = """
import os, time
from pathlib import Path

slow = {"1": True, "2": "SLURM_RESTART_COUNT" not in os.environ}.get(os.environ.get("SLURM_ARRAY_TASK_ID"), False)
if slow and "QUICK" not in os.environ and b"pipeline.data.prefetch" in Path("/proc/self/cmdline").read_bytes():
    time.sleep(300)
"""
"""The site's sitecustomize.py: a first stage that takes long for one point, and for another at its first start."""


def status(run: Path, stage: str) -> str:
    """The stage's line of the status table."""
    return next(line for line in command("status", run).out.splitlines() if line[2:].startswith(f"{stage} "))


def test_of_three_points_one_is_cancelled_one_is_queued_again_and_the_others_go_on(
    slurm: MiniSlurm, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    profile, folder = tmp_path / "profile.yaml", tmp_path / "a sweep"
    profile.write_text(yaml.safe_dump({**PROFILE, "environment": {"PYTHONPATH": str(tmp_path)}, "retries": 1}))
    stages = ("--stage", "prefetch,sft", "--sweep", "seed=1,2,3", "--cluster", profile)
    done = submit(folder, *stages, "--at-once", "2", "--no-follow", overrides=CHAIN_SETTINGS)
    assert done.status == 0, done.err
    said = re.search(
        r"submitted as job arrays of 3 points, at most 2 at once: prefetch \((\d+)\), sft \((\d+)\)", done.out
    )
    assert said is not None
    prefetch, sft = said.groups()
    runs = [folder / f"seed={seed}" for seed in (1, 2, 3)]
    slow = [("-m pipeline.data.prefetch", run) for run in runs]

    # The first point ends its stage, and the third one takes its place.
    wait_for(lambda: all(pids_running(run, words) for words, run in slow[1:]), "the second and the third point")
    waits = f"job {sft}_1 waits for the jobs before it (Dependency)"  # which Slurm says once it has looked at it
    wait_for(lambda: waits in status(runs[1], "sft"), "the reason", 60)
    slurm.command("scontrol", "requeue", f"{prefetch}_2")
    assert "cancelled prefetch, sft" in command("cancel", runs[1]).out
    wait_for(slurm.empty, "the other points to end", 180)

    for run, task in ((runs[0], 0), (runs[2], 2)):
        submission = submissions.read(RunDir(run))
        assert submission is not None
        assert [job.job_id for job in submission.jobs] == [f"{prefetch}_{task}", f"{sft}_{task}"]
        assert RunDir(run).outputs("sft") is not None, status(run, "sft")
        assert (run / "jobs" / f"{submission.id}-sft" / f"{sft}_{task}_0_log.err").stat().st_size
    again = atomic.read_json(runs[2] / "stages" / "prefetch" / "attempts" / "0002" / "job.json")
    assert again is not None and again["slurm_restart_count"] == "1"
    shown = command("sweep", folder).out.splitlines()
    assert [line.split()[:3] for line in shown[1:4]] == [
        *(["1", "sft", "done"], ["2", "cancelled:", "prefetch"], ["3", "sft", "done"]),
    ]

    # By hand, under another array's number.
    (path,) = (folder / "arrays").glob("*/prefetch/*_submission.sh")
    slurm.command("env", "QUICK=1", "sbatch", "--array=1", str(path))
    wait_for(lambda: RunDir(runs[1]).outputs("prefetch"), "the second point's first stage")
    submission = submissions.read(RunDir(runs[1]))
    assert submission is not None and str(submission.jobs[0].job_id).endswith("_1")
    assert submission.jobs[0].job_id != f"{prefetch}_1" and submission.jobs[1].job_id == f"{sft}_1"
