"""The chain on a real Slurm: two nodes of eight GPUs (device files only), preemption, cancellation, failure."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from helpers_cluster import CHAIN_SETTINGS, environment_of, held, tasks
from helpers_jobs import (
    command,
    copy_without,
    nothing_left,
    pids_running,
    policy_sha256,
    start,
    submit,
    until_training,
    wait_for,
)
from mini_slurm import MiniSlurm

from pipeline.run import atomic
from pipeline.run.directory import RunDir
from pipeline.run.progress import saved_steps
from pipeline.training.stop import EX_TEMPFAIL

pytestmark = [pytest.mark.slurm, pytest.mark.triton, pytest.mark.chain]


def test_the_whole_chain_runs_without_its_submitter(finished: Path) -> None:
    status = command("status", finished)
    assert status.status == 0, status.out
    for stage in ("prefetch", "sft", "reward-model", "sandbox", "convert", "train", "evaluate"):
        assert RunDir(finished).outputs(stage) is not None, status.out
    job = atomic.read_json(finished / "stages" / "train" / "attempts" / "0001" / "job.json")
    assert job is not None
    assert job["slurmd_nodename"] in ("n1", "n2")
    assert nothing_left(finished)


def test_a_rerun_submits_nothing(slurm: MiniSlurm, finished: Path, tmp_path: Path) -> None:
    run = copy_without(finished, tmp_path / "run")
    done = submit(run, "--cluster", slurm.folder / "profile.yaml", overrides=CHAIN_SETTINGS)
    assert (done.status, "nothing to do" in done.out) == (0, True), done.err


def test_a_training_that_is_preempted_told_to_end_and_requeued_ends_in_the_same_weights(
    slurm: MiniSlurm, finished: Path, tmp_path: Path
) -> None:
    run = until_training(finished, tmp_path / "run")
    profile = slurm.folder / "profile.yaml"
    follower = start(run, "--stage", "serve,train,evaluate", "--cluster", profile, overrides=CHAIN_SETTINGS)
    wait_for(lambda: list(run.glob("checkpoints/*/step-00000004")), "the first checkpoint")
    with held(run) as ranks:
        (server,) = pids_running(run, "tritonserver --")
        assert environment_of(server)["CUDA_VISIBLE_DEVICES"] == "7"
        assert {environment_of(pid)["CUDA_VISIBLE_DEVICES"] for pid in ranks} == {"0,1,2,3,4,5,6"}
        assert environment_of(server)["HH_SITE"] == "a value with 'quotes'"
        job = slurm.command("squeue", "-h", "-o", "%i", "-n", "hh-serve+train").strip()
    attempts, stop = run / "stages" / "train" / "attempts", run / "control" / "STOP"

    urgent = ("sbatch", "--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=sleep 2")
    grace = ("scancel", "--signal=TERM", job)  # as a site preempts that sends no other signal: the job runs on
    for number, interruption in enumerate((urgent, grace, ("scontrol", "requeue", job)), 1):
        if number < 3:
            with held(run):
                slurm.command(*interruption)
                wait_for(stop.exists, f"the training to be told of interruption {number}")
        else:  # this one comes with no time to save
            slurm.command(*interruption)
        wait_for((attempts / f"{number + 1:04d}" / "out").exists, f"interruption {number} to be over")
        reached = saved_steps(RunDir(run))
        if number < 3:
            ended = atomic.read_json(attempts / f"{number:04d}" / "exit.json")
            assert ended is not None
            assert ended["status"] == EX_TEMPFAIL
            wait_for(lambda reached=reached: saved_steps(RunDir(run)) > reached, "the training to get further")
    assert follower.wait(240) == 0
    assert policy_sha256(run) == policy_sha256(finished)
    assert len(list(attempts.iterdir())) == 4
    last = atomic.read_json(attempts / "0004" / "job.json")
    assert last is not None
    assert last["slurm_restart_count"] == "3"
    assert RunDir(run).outputs("evaluate") is not None  # it waited for the requeued job
    assert not stop.exists()
    wait_for(lambda: nothing_left(run), "every process to end", 20)


def test_a_killed_training_is_seen_and_what_waits_for_it_is_cancelled(
    slurm: MiniSlurm, finished: Path, tmp_path: Path
) -> None:
    run = until_training(finished, tmp_path / "run")
    profile = slurm.folder / "profile.yaml"
    follower = start(run, "--stage", "serve,train,evaluate", "--cluster", profile, overrides=CHAIN_SETTINGS)
    wait_for(lambda: pids_running(run, "pipeline.training.launch"), "the training to start")
    assert tasks(run)
    for pid in tasks(run):
        os.kill(pid, signal.SIGKILL)
    assert follower.wait(120) == 1
    status = command("status", run).out
    assert "train        failed" in status
    assert "evaluate     cancelled" in status
    wait_for(slurm.empty, "the jobs to leave the queue")
    wait_for(lambda: not pids_running(run), "every process to end", 20)


def test_cancel_ends_the_jobs_and_those_that_wait_for_them(slurm: MiniSlurm, finished: Path, tmp_path: Path) -> None:
    run = until_training(finished, tmp_path / "run")
    profile = slurm.folder / "profile.yaml"
    follower = start(run, "--stage", "serve,train,evaluate", "--cluster", profile, overrides=CHAIN_SETTINGS)
    wait_for(lambda: pids_running(run, "-m pipeline.training.ppo", "-u"), "the training to start")
    cancelled = command("cancel", run)
    assert cancelled.status == 0, cancelled.err
    assert "cancelled serve, train, evaluate" in cancelled.out
    assert slurm.empty()
    assert follower.wait(120) == 1
    wait_for(lambda: nothing_left(run), "every process to end", 20)
