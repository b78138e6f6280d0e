"""Jobs that try again on a real Slurm: out of memory or time, killed, on a broken node; and time limits in segments."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers_cluster import CHAIN_SETTINGS, PROFILE, held, tasks
from helpers_jobs import (
    command,
    nothing_left,
    pids_running,
    policy_sha256,
    start,
    submit,
    until_training,
    wait_for,
)
from mini_slurm import MiniSlurm

from pipeline.run import atomic, bad_nodes, events
from pipeline.run.directory import RunDir
from pipeline.scheduler import submission as submissions

pytestmark = [pytest.mark.slurm]

FAULTS = """
import json, os, time
from pathlib import Path

words = Path("/proc/self/cmdline").read_bytes().decode().split("\\0")
command = " ".join(words)
first = "SLURM_RESTART_COUNT" not in os.environ
for fault in filter(None, os.environ.get("SITE_FAULTS", "").split(";")):
    what, module = fault.split("@")
    if f"-m {module} " in command:
        if what == "hungry" and first:
            taken = bytearray(1400 << 20)
            time.sleep(60)  # where it is Slurm that looks
        if what == "slow" and first:
            time.sleep(300)
        if what == os.environ["SLURMD_NODENAME"]:
            os.write(2, b"RuntimeError: No CUDA GPUs are available\\n")
            os._exit(1)

made = {"pipeline.data.prefetch": ("data", "model"), "pipeline.training.sft": ("model",)}
work = words[words.index("-m") + 1] if "-m" in words else ""
if work in made:
    out = Path(words[words.index("--out") + 1])
    for name in made[work]:
        (out / name).mkdir()
        (out / name / "note").write_text(work)
    (out / "result.json").write_text(json.dumps({"artifacts": {name: name for name in made[work]}, "values": {}}))
    os._exit(0)
"""
"""A site on which things go wrong: its sitecustomize.py, which every Python there runs first. What it lets run is a
stand-in that has done its work at once: here it is the jobs that are looked at."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(FAULTS)
    return folder


def profile(site: Path, faults: str = "", **changes: object) -> Path:
    environment = {"PYTHONPATH": str(site), "SITE_FAULTS": faults}
    small = {"time_min": 30, "cpus": 4, "mem_gb": 1}
    path = site / f"{len(list(site.iterdir()))}.yaml"
    wanted = {"retries": 2, "retry_growth": 2, "environment": environment, "default": small, **changes}
    path.write_text(yaml.safe_dump({**PROFILE, **wanted}))
    return path


def told(run: Path) -> list[str]:
    """The run's retries, as its events tell them."""
    return [event["reason"] for event in events.read(RunDir(run)) if event["event"] == "retry"]


def submitted(run: Path) -> list[str]:
    """The jobs of the run's submission, in order."""
    submission = submissions.read(RunDir(run))
    assert submission is not None
    return [job.job_id for job in submission.jobs if job.job_id]


@pytest.fixture(scope="module")
def slow(slurm: MiniSlurm, site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A stage that does not end within its minute; it waits beside the other tests."""
    run = tmp_path_factory.mktemp("slow") / "run"
    path = profile(
        site,
        "slow@pipeline.data.prefetch",
        default={"time_min": 30, "cpus": 4, "mem_gb": 8},
        stages={"prefetch": {"time_min": 1, "cpus": 1, "mem_gb": 4}},
    )
    done = submit(run, "--cluster", path, "--stage", "prefetch,sft", "--no-follow", env=slurm.environment)
    assert done.status == 0, done.err
    yield run
    slurm.clear()


@pytest.mark.parametrize("hungry", ["pipeline.data.prefetch", "pipeline.stages.job"])
def test_a_job_that_is_killed_for_memory_tries_again_with_more(
    slurm: MiniSlurm, slow: Path, site: Path, tmp_path: Path, hungry: str
) -> None:
    run, path = tmp_path / "a run", profile(site, f"hungry@{hungry}")
    done = submit(run, "--cluster", path, "--stage", "prefetch,sft")
    assert done.status == 0, done.out + done.err  # sft waited for it
    assert set(told(run)) == {"retry 1 of 2 with 2 GB: it ran out of memory"}  # one job, or each of the two
    assert "pending            retry 1 of 2 with 2 GB: it ran out of memory" in done.out
    planned = submit(run, "--cluster", path, "--stage", "prefetch", "--force", "--dry-run")
    assert "forced; asks for 2 GB: it ran out of memory" in planned.out
    assert "#SBATCH --mem=2G" in planned.out


def test_a_job_leaves_a_broken_node_and_so_do_those_that_follow(slurm: MiniSlurm, site: Path, tmp_path: Path) -> None:
    run, path = tmp_path / "run", profile(site, "n1@pipeline.data.prefetch;n1@pipeline.training.sft")
    done = submit(run, "--cluster", path, "--stage", "prefetch,sft")
    assert done.status == 0, done.out + done.err
    # The one that waited in the queue went to n2 at once.
    assert told(run) == ["retry 1 of 2 without n1: n1 is broken: RuntimeError: No CUDA GPUs are available"]
    job = atomic.read_json(run / "stages" / "prefetch" / "attempts" / "0002" / "job.json")
    assert job is not None
    assert job["slurmd_nodename"] == "n2"
    done = submit(run, "--cluster", path, "--stage", "sft", "--force")
    assert done.status == 0, done.out + done.err
    assert len(told(run)) == 1  # it, too
    assert "node n1 is avoided since" in command("status", run).out


def test_retries_end_and_nodes_that_all_fail_are_not_blamed(slurm: MiniSlurm, site: Path, tmp_path: Path) -> None:
    run, path = tmp_path / "run", profile(site, "n1@pipeline.data.prefetch;n2@pipeline.data.prefetch")
    done = submit(run, "--cluster", path, "--stage", "prefetch,sft")
    assert done.status == 1
    assert "No CUDA GPUs are available" in done.err
    assert "2 of 2 retries are used (cluster.retries); it failed so on n1, n2" in done.err
    assert len(told(run)) == 2
    assert re.search(r"sft +cancelled", command("status", run).out)
    assert bad_nodes.known(RunDir(run)) == []


def test_a_cancelled_job_is_never_tried_again(slurm: MiniSlurm, site: Path, tmp_path: Path) -> None:
    run, path = tmp_path / "run", profile(site, "slow@pipeline.data.prefetch")
    follower = start(run, "--cluster", path, "--stage", "prefetch,sft")
    wait_for(lambda: pids_running(run, "pipeline.data.prefetch"), "the stage to start")
    slurm.command("scancel", submitted(run)[0])
    assert follower.wait(120) == 1
    assert re.search(r"prefetch +cancelled", command("status", run).out)
    assert told(run) == []
    wait_for(lambda: nothing_left(run), "every process to end", 20)


@pytest.mark.triton
@pytest.mark.chain
def test_a_training_whose_task_is_killed_goes_on_from_its_checkpoint(
    slurm: MiniSlurm, finished: Path, tmp_path: Path
) -> None:
    run = until_training(finished, tmp_path / "run")
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump({**PROFILE, "retries": 1}))
    follower = start(run, "--stage", "serve,train,evaluate", "--cluster", path, overrides=CHAIN_SETTINGS)
    wait_for(lambda: list(run.glob("checkpoints/*/step-00000004")), "the first checkpoint")
    for pid in tasks(run):
        os.kill(pid, signal.SIGKILL)
    assert follower.wait(300) == 0
    assert told(run) == ["retry 1 of 1: it was killed (signal 9)"]
    assert policy_sha256(run) == policy_sha256(finished)
    assert "resum" in (run / "stages" / "train" / "attempts" / "0002" / "stdout.log").read_text().lower()
    wait_for(lambda: nothing_left(run), "every process to end", 20)


@pytest.mark.triton
@pytest.mark.chain
def test_a_time_limit_shorter_than_the_training_makes_several_segments(
    slurm: MiniSlurm, finished: Path, tmp_path: Path
) -> None:
    run = until_training(finished, tmp_path / "run")
    path = tmp_path / "profile.yaml"
    short = {"time_min": 1, "cpus": 16, "mem_gb": 64, "gpus": 8}
    path.write_text(yaml.safe_dump({**PROFILE, "grace_s": 20, "stages": {"serve": short, "train": short}}))
    follower = start(run, "--stage", "serve,train,evaluate", "--cluster", path, overrides=CHAIN_SETTINGS)
    stop, second = run / "control" / "STOP", run / "stages" / "train" / "attempts" / "0002"
    wait_for(lambda: list(run.glob("checkpoints/*/step-00000004")) or stop.exists(), "the training to get going")
    with held(run):
        wait_for(lambda: stop.exists() or second.exists(), "Slurm's warning", 90)
        (job, _) = submitted(run)
        slurm.command("scontrol", "update", f"JobId={job}", "TimeLimit=30")  # it is warned; a slow machine needs time
    wait_for(second.exists, "the second segment", 240)
    assert follower.wait(300) == 0
    assert told(run) == []  # a segment is no retry
    assert policy_sha256(run) == policy_sha256(finished)
    assert RunDir(run).outputs("evaluate") is not None


def test_a_stage_out_of_time_tries_again_with_a_longer_limit(slurm: MiniSlurm, slow: Path) -> None:
    wait_for(lambda: told(slow), "the time limit", 180)
    wait_for(lambda: not slurm.command("squeue", "-h", "-j", ",".join(submitted(slow))).strip(), "its jobs to end", 180)
    assert told(slow) == ["retry 1 of 2 with 2 min: it reached its time limit"]
    for stage in ("prefetch", "sft"):  # which waited
        assert RunDir(slow).outputs(stage) is not None
