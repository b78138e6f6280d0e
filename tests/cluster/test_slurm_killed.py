"""Every stage killed or cancelled while it works: seen for what it is, and mended by submitting again."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_cluster import CHAIN_SETTINGS, children, states, tasks
from helpers_jobs import nothing_left, pids_running, policy_sha256, start, submit, until_training, wait_for
from mini_slurm import MiniSlurm

from pipeline.run import endpoint
from pipeline.run.directory import RunDir

pytestmark = [pytest.mark.slurm, pytest.mark.triton, pytest.mark.chain]

TOGETHER = (("prefetch",), ("sandbox", "sft"), ("reward-model",), ("convert",), ("serve+train",), ("evaluate",))
"""The chain's jobs; those of one group run at the same time."""
WORK = {"serve+train": "pipeline.training.launch"}
"""What the command line of a job's work holds, where the job has other children too."""
SHORT = ("sandbox",)
"""Jobs that are over before scancel, which takes a moment, reaches work that has been seen: found in the cache."""


def kill_task(slurm: MiniSlurm, run: Path, job: str) -> None:
    wait_for(lambda: tasks(run, job), f"the task of {job}")
    for pid in tasks(run, job):
        os.kill(pid, signal.SIGKILL)


def kill_work(slurm: MiniSlurm, run: Path, job: str) -> None:
    wait_for(lambda: children(tasks(run, job), WORK.get(job, "")), f"the work of {job}")
    for pid in children(tasks(run, job), WORK.get(job, "")):
        os.kill(pid, signal.SIGKILL)


def scancel(slurm: MiniSlurm, run: Path, job: str) -> None:
    wait_for(lambda: tasks(run, job) if job in SHORT else children(tasks(run, job)), f"the work of {job}")
    slurm.command("scancel", "--name", f"hh-{job}")


STRIKES: tuple[tuple[Callable[[MiniSlurm, Path, str], None], str, str], ...] = (
    (kill_task, "failed", "it was killed or lost its node"),
    (kill_work, "failed", "killed by signal 9"),
    (scancel, "cancelled", "scancel|asked to end"),
)
"""What happens to a job, the state that its stage then has, and what the reason says: a regular expression."""


def test_a_chain_whose_every_stage_is_killed_and_cancelled_ends_as_an_undisturbed_one(
    slurm: MiniSlurm, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ("--cluster", slurm.folder / "profile.yaml", "--no-follow")
    for jobs in TOGETHER:
        for strike, state, reason in STRIKES:
            done = submit(run, *arguments, overrides=CHAIN_SETTINGS)
            assert done.status == 0, done.err
            for job in jobs:
                strike(slurm, run, job)
            wait_for(slurm.empty, "the dependents to leave the queue")
            wait_for(lambda: nothing_left(run), "every process to end", 30)
            seen = states(run)
            for stage in (stage for job in jobs for stage in job.split("+") if stage != "serve"):
                assert seen[stage][0] == state and re.search(reason, seen[stage][1]), (strike, stage, seen)
            if jobs != ("evaluate",):
                assert seen["evaluate"][0] == "cancelled", (strike, jobs, seen)
                assert re.fullmatch(r"[a-z-]+ (failed|cancelled)", seen["evaluate"][1]), (strike, jobs, seen)
    done = submit(run, *arguments[:-1], overrides=CHAIN_SETTINGS)
    assert done.status == 0, done.err
    for stage in ("prefetch", "sft", "reward-model", "train"):
        assert contents(run, stage) == contents(finished, stage), stage
    assert RunDir(run).values("convert")["identity"] == RunDir(finished).values("convert")["identity"]
    assert RunDir(run).values("evaluate") == RunDir(finished).values("evaluate")


def contents(run: Path, stage: str) -> dict[str, str]:
    outputs = RunDir(run).outputs(stage)
    assert outputs is not None
    return {name: artifact.sha256 for name, artifact in outputs.artifacts.items()}


def test_a_reward_server_and_its_model_process_killed_during_the_training_come_back(
    slurm: MiniSlurm, finished: Path, tmp_path: Path
) -> None:
    run = until_training(finished, tmp_path / "a'; echo foo")
    profile = slurm.folder / "profile.yaml"
    follower = start(run, "--stage", "serve,train", "--cluster", profile, overrides=CHAIN_SETTINGS)
    wait_for(lambda: list(run.glob("checkpoints/*/step-00000004")), "the first checkpoint")
    (server,) = pids_running(run, "tritonserver --")
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: (now := endpoint.read(RunDir(run))) is not None and now.restarts == 1, "the server to come back")
    (stub,) = pids_running(run, "triton_python_backend_stub")
    os.kill(stub, signal.SIGKILL)
    assert follower.wait(240) == 0
    assert [path.name for path in (run / "stages" / "train" / "attempts").iterdir()] == ["0001"]
    assert policy_sha256(run) == policy_sha256(finished)
    wait_for(lambda: nothing_left(run), "every process to end", 20)
