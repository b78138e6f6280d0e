"""GPUs that do not start at 0, have no numbers, or are missing; and two runs that share a node."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_cluster import CHAIN_SETTINGS, PROFILE, environment_of, held, profile, states
from helpers_jobs import command, nothing_left, pids_running, policy_sha256, start, submit, until_training, wait_for
from mini_slurm import MiniSlurm

from pipeline.run import endpoint
from pipeline.run.directory import RunDir

pytestmark = [pytest.mark.slurm, pytest.mark.triton, pytest.mark.chain]


def with_gpus(folder: Path, name: str, gpus: int, visible: str | None = None, node: str = "n1") -> Path:
    """A profile whose training asks for GPUs of one node; `visible` is the shell word that a site makes of their list.

    srun sets CUDA_VISIBLE_DEVICES itself, so a site's own names come from a prolog of each task, as here.
    """
    srun_args = ["--cpu-bind=none"]
    if visible is not None:
        prolog = folder / f"{name}-prolog.sh"
        prolog.write_text(f"#!/bin/bash\necho export CUDA_VISIBLE_DEVICES={visible}\n")
        prolog.chmod(0o755)
        srun_args.append(f"--task-prolog={prolog}")
    stages = {"train": {**PROFILE["stages"]["train"], "gpus": gpus}}
    return profile(folder, name, stages=stages, srun_args=srun_args, extra={"nodelist": node})


def devices(run: Path, *words: str) -> set[str]:
    """What the run's processes with these words in their command line have as CUDA_VISIBLE_DEVICES."""
    return {environment_of(pid)["CUDA_VISIBLE_DEVICES"] for pid in pids_running(run, *words)}


def test_two_trainings_share_a_node_with_a_strangers_job_and_do_not_mix(
    slurm: MiniSlurm, finished: Path, tmp_path: Path
) -> None:
    stranger = ("--partition=gpu", "--nodelist=n1", "--gpus-per-node=3", "--mem=1G", "--output=/dev/null")
    job = slurm.command("sbatch", "--parsable", *stranger, "--wrap=sleep 600").strip()
    wait_for(lambda: slurm.command("squeue", "-h", "-t", "running", "-j", job).strip(), "the stranger's job")
    try:
        first, second = until_training(finished, tmp_path / "a 0"), until_training(finished, tmp_path / 'a"=0"')
        by_number = with_gpus(slurm.folder, "three", 3)
        followers = [start(first, "--stage", "serve,train", "--cluster", by_number, overrides=CHAIN_SETTINGS)]
        wait_for(lambda: pids_running(first, "tritonserver --"), "the first server")
        by_uuid = with_gpus(slurm.folder, "two", 2, "GPU-${CUDA_VISIBLE_DEVICES//,/,GPU-}")
        followers += [start(second, "--stage", "serve,train", "--cluster", by_uuid, overrides=CHAIN_SETTINGS)]
        wait_for(lambda: list(first.glob("checkpoints/*/step-00000004")), "the first checkpoint")
        with held(first):
            wait_for(lambda: list(second.glob("checkpoints/*/step-00000004")), "that of the second run")
            assert devices(first, "-m pipeline.training.ppo", "-u") == {"3,4"}
            assert devices(first, "tritonserver --") == {"5"}
            assert devices(second, "-m pipeline.training.ppo", "-u") == {"GPU-6"}
            assert devices(second, "tritonserver --") == {"GPU-7"}
            servers = [endpoint.read(RunDir(run)) for run in (first, second)]
            assert len({(server.triton_host, server.pid) for server in servers if server is not None}) == 2
        assert [follower.wait(300) for follower in followers] == [0, 0]
        assert [policy_sha256(run) for run in (first, second)] == [policy_sha256(finished)] * 2
    finally:
        slurm.command("scancel", job)
    wait_for(lambda: nothing_left(first) and nothing_left(second), "every process to end", 30)


@pytest.mark.parametrize("visible", ["NoDevFiles", "", "0,1"])
def test_a_job_that_sees_fewer_gpus_than_it_asked_for_says_so_and_starts_nothing(
    slurm: MiniSlurm, finished: Path, tmp_path: Path, visible: str
) -> None:
    run = until_training(finished, tmp_path / "run")
    blind = with_gpus(slurm.folder, "blind", 8, visible, node="n2")
    arguments = ("--stage", "serve,train,evaluate", "--cluster", blind, "--no-follow")
    assert submit(run, *arguments, overrides=CHAIN_SETTINGS).status == 0
    wait_for(slurm.empty, "the jobs to leave the queue")
    seen = states(run)
    count = len(visible.split(",")) if "," in visible else 0
    assert seen["train"] == (
        "failed",
        f"n2: {count} GPUs visible, 8 asked for (CUDA_VISIBLE_DEVICES is {visible!r}); leave the node out "
        "(cluster.exclude), or correct gpus of train in profile blind",
    )
    assert (seen["serve"][0], seen["evaluate"][0]) == ("failed", "cancelled")
    assert not (run / "stages" / "train" / "attempts").exists()
    assert not (run / "stages" / "serve" / "tritonserver.log").exists()
    assert command("status", run).status == 1
