"""Nodes and the controller fail while jobs run: what Slurm knows of it, and what nobody makes up meanwhile."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from helpers_cluster import CHAIN_SETTINGS, environment_of, profile, states
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

from pipeline import procs
from pipeline.run.directory import RunDir

pytestmark = [pytest.mark.slurm, pytest.mark.triton, pytest.mark.chain]


def power_off(slurm: MiniSlurm, node: str) -> None:
    """End a node with all that runs on it, and let the controller know at once, which it would find out by itself."""
    slurm.stop_daemon(node, signal.SIGKILL)
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue
        if f"SLURMD_NODENAME={node}".encode() in environment.split(b"\0") or is_step(name, entry, node):
            os.kill(int(entry.name), signal.SIGKILL)
    slurm.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")


def is_step(name: bytes, entry: Path, node: str) -> bool:
    return name.startswith(b"slurmstepd") and node in (entry / "cwd").readlink().parts


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
        wait_for(lambda: pids_running(lost, "-m pipeline.training.ppo", "-u"), "the other training")
    finally:
        slurm.command("scontrol", "update", "NodeName=n2", "State=RESUME")
    power_off(slurm, "n1")
    try:
        wait_for(lambda: states(lost)["evaluate"][0] == "cancelled", "the lost run's end")
        seen = states(lost)
        assert (seen["train"][0], "its node failed" in seen["train"][1]) == ("failed", True), seen
        wait_for(lambda: not slurm.command("squeue", "-h").strip(), "the other run to end", 240)
    finally:
        slurm.start_daemon("n1")
        slurm.command("scontrol", "update", "NodeName=n1", "State=RESUME")
    slurm.wait_for_nodes()
    assert command("status", moving).status == 0
    assert policy_sha256(moving) == policy_sha256(finished)
    assert RunDir(moving).outputs("evaluate") is not None
    wait_for(lambda: nothing_left(moving) and nothing_left(lost), "every process to end", 30)
