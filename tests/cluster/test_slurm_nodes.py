"""Nodes and the controller fail while jobs run: what Slurm knows of it, and what nobody makes up meanwhile."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers_cluster import CHAIN_SETTINGS, children, held, profile, states, tasks
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
from mini_slurm import NODES, MiniSlurm

from pipeline.run.directory import RunDir
from pipeline.scheduler import submission as submissions

pytestmark = [pytest.mark.slurm, pytest.mark.triton, pytest.mark.chain]


def power_off(slurm: MiniSlurm, node: str) -> None:
    """End a node with all that runs on it, and tell the controller, which would find out by itself in some minutes."""
    slurm.stop_daemon(node, signal.SIGKILL)
    steps = tuple(f"slurmstepd: [{job}.".encode() for job in slurm.job_ids("-w", node))
    slurm.kill_processes(lambda line, _: line.startswith(steps))  # so that nobody reports the rest
    slurm.kill_processes(lambda _, environment: f"SLURMD_NODENAME={node}".encode() in environment)
    slurm.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")


def test_when_a_node_dies_its_training_goes_on_elsewhere_or_is_seen_as_lost(
    slurm: MiniSlurm, finished: Path, tmp_path: Path
) -> None:
    moving, lost = until_training(finished, tmp_path / "ein Lauf ü 试验"), until_training(finished, tmp_path / "lost")
    four = {"train": {"time_min": 60, "cpus": 16, "mem_gb": 64, "gpus": 4}}
    profiles = {
        moving: profile(slurm.folder, "requeued", stages=four),
        lost: profile(slurm.folder, "not-requeued", stages=four, requeue=False),
    }
    arguments = ("--stage", "serve,train,evaluate", "--no-follow", "--cluster")
    slurm.command("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    try:
        for run, site in profiles.items():
            assert submit(run, *arguments, site, overrides=CHAIN_SETTINGS).status == 0
        wait_for(lambda: list(moving.glob("checkpoints/*/step-00000004")), "the first checkpoint")
        with held(moving):
            wait_for(lambda: pids_running(lost, "-m pipeline.training.ppo", "-u"), "the other training")
    finally:
        slurm.command("scontrol", "update", "NodeName=n2", "State=RESUME")
    power_off(slurm, "n1")
    try:
        wait_for(lambda: states(lost)["evaluate"][0] == "cancelled", "the lost run's end")
        seen = states(lost)
        assert (seen["train"][0], "its node failed" in seen["train"][1]) == ("failed", True), seen
        wait_for(slurm.empty, "the other run to end", 240)
    finally:
        slurm.start_daemon("n1")
        slurm.command("scontrol", "update", "NodeName=n1", "State=RESUME")
    slurm.wait_for_nodes()
    assert command("status", moving).status == 0
    assert policy_sha256(moving) == policy_sha256(finished)
    assert RunDir(moving).outputs("evaluate") is not None
    wait_for(lambda: nothing_left(moving) and nothing_left(lost), "every process to end", 30)


def test_while_the_controller_is_away_jobs_go_on_and_nobody_makes_anything_up(
    slurm: MiniSlurm, finished: Path, tmp_path: Path
) -> None:
    run, other = copy_without(finished, tmp_path / "run", "sft"), copy_without(finished, tmp_path / "other", "evaluate")
    site = slurm.folder / "profile.yaml"
    chain = ("--stage", "sft,train,evaluate", "--cluster", site)
    follower = start(run, *chain, overrides=CHAIN_SETTINGS)
    wait_for(lambda: children(tasks(run, "sft")), "the work of sft")
    first = submissions.read(RunDir(run))
    slurm.stop_daemon("slurmctld")
    for node in NODES:
        slurm.stop_daemon(node, signal.SIGKILL)
    impatient = slurm.folder / "impatient.conf"  # Slurm's own commands give up after a second; ours try again for long
    impatient.write_text((slurm.folder / "slurm.conf").read_text() + "MessageTimeout=1\n")
    env = {"SLURM_CONF": str(impatient)}
    try:
        with ThreadPoolExecutor() as pool:
            status = pool.submit(command, "status", run, env=env)
            again = pool.submit(submit, run, *chain, "--no-follow", overrides=CHAIN_SETTINGS, env=env)
            new = pool.submit(submit, other, "--cluster", site, "--no-follow", overrides=CHAIN_SETTINGS, env=env)
        assert status.result().status == 0
        assert "cancelled" not in status.result().out and "failed" not in status.result().out
        assert (again.result().status, "running already" in again.result().out) == (0, True), again.result()
        assert (new.result().status, new.result().err.count("\n")) == (2, 1), new.result()
        wait_for(lambda: states(run)["sft"][0] == "done", "sft to end without the controller")
    finally:
        for daemon in ("slurmctld", *NODES):
            slurm.start_daemon(daemon)
    assert follower.wait(120) == 0
    assert submissions.read(RunDir(run)) == first
    assert [path.name for path in (run / "stages" / "sft" / "attempts").iterdir()] == ["0001"]
    slurm.wait_for_nodes()
    assert submit(other, "--cluster", site, overrides=CHAIN_SETTINGS).status == 0
    wait_for(lambda: nothing_left(run) and nothing_left(other), "every process to end", 30)
