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

WORK = """
import os, time
from pathlib import Path

words = Path("/proc/self/cmdline").read_text().split("\\0")
if "-m" in words and words[words.index("-m") + 1] in ("pipeline.data.prefetch", "pipeline.training.sft"):
    task, first = os.environ["SLURM_ARRAY_TASK_ID"], "SLURM_RESTART_COUNT" not in os.environ
    if "pipeline.data.prefetch" in words and "QUICK" not in os.environ:
        if task == "0" and first:
            os.write(2, b"RuntimeError: No CUDA GPUs are available\\n")
            os._exit(1)
        if task == "1" or (task == "2" and first):
            time.sleep(300)
        if task == "3":
            os._exit(1)
    out = Path(words[words.index("--out") + 1])
    (out / "made").write_text(task)
    (out / "result.json").write_text('{"artifacts": {"data": "made", "model": "made"}, "values": {}}')
    os._exit(0)
"""
"""The site's sitecustomize.py stands in for the stages' work. The first stage meets a broken node at the first point's
first start; it takes long for the second point, and for the third at its first start; at the fourth it fails."""


def status(run: Path, stage: str) -> str:
    """The stage's line of the status table."""
    return next(line for line in command("status", run).out.splitlines() if line[2:].startswith(f"{stage} "))


def nodes(run: Path) -> list[str]:
    """Where the attempts at the first stage ran."""
    records = (atomic.read_json(path) for path in sorted(run.glob("stages/prefetch/attempts/*/job.json")))
    return [record["slurmd_nodename"] for record in records if record is not None]


def test_of_four_points_one_tries_again_one_is_cancelled_one_is_queued_again_and_one_fails(
    slurm: MiniSlurm, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WORK)
    profile, folder = tmp_path / "profile.yaml", tmp_path / "a sweep"
    profile.write_text(yaml.safe_dump({**PROFILE, "environment": {"PYTHONPATH": str(tmp_path)}, "retries": 1}))
    stages = ("--stage", "prefetch,sft", "--sweep", "seed=1,2,3,4", "--cluster", profile)
    done = submit(folder, *stages, "--at-once", "2", "--no-follow", overrides=CHAIN_SETTINGS)
    assert done.status == 0, done.err
    said = re.search(
        r"submitted as job arrays of 4 points, at most 2 at once: prefetch \((\d+)\), sft \((\d+)\)", done.out
    )
    assert said is not None
    prefetch, sft = said.groups()
    runs = [folder / f"seed={seed}" for seed in (1, 2, 3, 4)]
    slow = [("-m pipeline.data.prefetch", run) for run in runs]

    # The third point takes the first one's place, which waits for its retry or has ended well.
    wait_for(lambda: all(pids_running(run, words) for words, run in slow[1:3]), "the second and the third point")
    waits = f"job {sft}_1 waits for the jobs before it (Dependency)"  # which Slurm says once it has looked at it
    wait_for(lambda: waits in status(runs[1], "sft"), "the reason", 60)
    slurm.command("scontrol", "requeue", f"{prefetch}_2")
    assert "cancelled prefetch, sft" in command("cancel", runs[1]).out
    wait_for(slurm.empty, "the other points to end", 180)
    bad, good = nodes(runs[0])
    assert bad != good
    jobs = [slurm.command("scontrol", "--oneliner", "show", "job", f"{each}_3") for each in (prefetch, sft)]
    assert [re.search(r" JobState=(\S+)", job)[1] for job in jobs] == ["FAILED", "CANCELLED"]
    excluded = [slurm.command("scontrol", "--oneliner", "show", "job", f"{sft}_{task}") for task in (0, 2)]
    assert [re.search(r" ExcNodeList=(\S+)", each)[1] for each in excluded] == [bad, "(null)"]  # and no other point's

    for run, task in ((runs[0], 0), (runs[2], 2)):
        submission = submissions.read(RunDir(run))
        assert submission is not None
        assert [job.job_id for job in submission.jobs] == [f"{prefetch}_{task}", f"{sft}_{task}"]
        assert RunDir(run).artifact("sft", "model").read_text() == str(task)
        assert (run / "jobs" / f"{submission.id}-sft" / f"{sft}_{task}_0_log.err").stat().st_size
    again = atomic.read_json(runs[2] / "stages" / "prefetch" / "attempts" / "0002" / "job.json")
    assert again is not None
    assert (again["slurm_job_id"], again["slurm_restart_count"]) == (f"{prefetch}_2", "1")
    shown = command("sweep", folder).out.splitlines()
    assert [line.split()[:3] for line in shown[1:5]] == [
        *(["1", "sft", "done"], ["2", "cancelled:", "prefetch"], ["3", "sft", "done"], ["4", "failed:", "prefetch"]),
    ]
    assert "cancelled" in status(runs[3], "sft")

    # By hand, under another array's number.
    (path,) = (folder / "arrays").glob("*/prefetch/*_submission.sh")
    slurm.command("env", "QUICK=1", "sbatch", "--array=1", str(path))
    wait_for(lambda: RunDir(runs[1]).outputs("prefetch"), "the second point's first stage")
    submission = submissions.read(RunDir(runs[1]))
    assert submission is not None and str(submission.jobs[0].job_id).endswith("_1")
    assert submission.jobs[0].job_id != f"{prefetch}_1" and submission.jobs[1].job_id == f"{sft}_1"
