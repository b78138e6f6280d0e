"""The chain on a real Slurm: two nodes of eight GPUs (device files only), preemption, cancellation, failure."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers_jobs import TINY, command, nothing_left, pids_running, policy_sha256, start, submit, wait_for
from mini_slurm import MiniSlurm, missing_programs

from pipeline.run import atomic
from pipeline.run.directory import RunDir

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.triton,
    pytest.mark.chain,
    pytest.mark.skipif(
        bool(missing_programs()) and "CI" not in os.environ, reason=f"not installed: {', '.join(missing_programs())}"
    ),
]

SETTINGS = (
    *TINY,
    *("train.num_processes=2", "train.accelerate_config=ddp-cpu", "sandbox.engine=venv"),
    *("train.total_steps=200", "train.eval_interval=100"),  # longer than Slurm takes to preempt a job
)
PROFILE = {
    "name": "mini",
    "executor": "slurm",
    "partition": "gpu",
    "environment": {"HH_SITE": "a value with 'quotes'"},
    "grace_s": 60,
    "default": {"time_min": 30, "cpus": 4, "mem_gb": 8},
    "stages": {"train": {"time_min": 60, "cpus": 16, "mem_gb": 64, "gpus": 8}},
}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniSlurm]:
    """The cluster, and SLURM_CONF set to it."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "profile.yaml").write_text(yaml.safe_dump(PROFILE))
    cluster = MiniSlurm(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="module")
def finished(slurm: MiniSlurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole chain, submitted by a process that leaves at once; nothing of ours watches over it."""
    run = tmp_path_factory.mktemp("chain") / "a run"
    done = submit(run, "--cluster", slurm.folder / "profile.yaml", "--no-follow", overrides=SETTINGS)
    assert done.status == 0, done.err
    assert len(slurm.command("squeue", "-h").splitlines()) == 7  # the server shares its training's job
    wait_for(lambda: not slurm.command("squeue", "-h").strip(), "the chain to end", 300)
    return run


def until_training(finished: Path, run: Path) -> Path:
    """A copy of the finished run in which the training and what follows it have not happened."""
    shutil.copytree(finished, run, symlinks=True)
    for stage in ("serve", "train", "evaluate"):
        shutil.rmtree(run / "stages" / stage)
    for path in ("checkpoints", "models/policy", "metrics.jsonl", "report", "services", "submission.json"):
        target = run / path
        if target.is_symlink() or target.is_file():
            target.unlink()
        else:
            shutil.rmtree(target, ignore_errors=True)
    return run


def is_task(cmdline: Path, run: Path) -> bool:
    """Whether a process is the one that Slurm started for a job of the run."""
    try:
        line = cmdline.read_bytes().decode()
    except OSError:
        return False
    return "pipeline.stages.job" in line and str(run) in line and not line.startswith(("srun", "/usr/bin/srun"))


def environment_of(pid: int) -> dict[str, str]:
    """A process's environment, as it was started."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.partition("=")[::2] for entry in entries if entry)


def test_the_whole_chain_runs_without_its_submitter(finished: Path) -> None:
    status = command("status", finished)
    assert status.status == 0, status.out
    for stage in ("prefetch", "sft", "reward-model", "sandbox", "convert", "train", "evaluate"):
        assert RunDir(finished).outputs(stage) is not None, status.out
    job = atomic.read_json(finished / "stages" / "train" / "attempts" / "0001" / "job.json")
    assert job is not None
    assert job["slurmd_nodename"] in ("n1", "n2")
    assert nothing_left(finished)


def test_a_rerun_submits_nothing(slurm: MiniSlurm, finished: Path) -> None:
    done = submit(finished, "--cluster", slurm.folder / "profile.yaml", overrides=SETTINGS)
    assert (done.status, "nothing to do" in done.out) == (0, True), done.err


@pytest.mark.parametrize("how", ["preempted by an urgent job", "requeued by hand"])
def test_an_interrupted_training_goes_on_and_ends_in_the_same_weights(
    slurm: MiniSlurm, finished: Path, tmp_path: Path, how: str
) -> None:
    run = until_training(finished, tmp_path / "run")
    profile = slurm.folder / "profile.yaml"
    follower = start(run, "--stage", "serve,train,evaluate", "--cluster", profile, overrides=SETTINGS)
    wait_for(lambda: list(run.glob("checkpoints/*/step-00000004")), "the first checkpoint")
    (server,) = pids_running(run, "tritonserver --")
    ranks = pids_running(run, "-m pipeline.training.ppo", "-u")
    assert environment_of(server)["CUDA_VISIBLE_DEVICES"] == "7"
    assert {environment_of(pid)["CUDA_VISIBLE_DEVICES"] for pid in ranks} == {"0,1,2,3,4,5,6"}
    assert environment_of(server)["HH_SITE"] == "a value with 'quotes'"
    if how == "requeued by hand":  # TERM without a warning, and a kill soon after
        slurm.command("scontrol", "requeue", slurm.command("squeue", "-h", "-o", "%i", "-n", "hh-serve+train").strip())
    else:
        urgent = ("--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=sleep 2")
        slurm.command("sbatch", *urgent)
    assert follower.wait(240) == 0
    assert policy_sha256(run) == policy_sha256(finished)
    attempts = sorted(path.name for path in (run / "stages" / "train" / "attempts").iterdir())
    assert attempts == ["0001", "0002"]
    second = atomic.read_json(run / "stages" / "train" / "attempts" / "0002" / "job.json")
    assert second is not None
    assert second["slurm_restart_count"] == "1"
    assert RunDir(run).outputs("evaluate") is not None  # it waited for the requeued job
    assert not (run / "control" / "STOP").exists()
    wait_for(lambda: nothing_left(run), "every process to end", 20)


def test_a_killed_training_is_seen_and_what_waits_for_it_is_cancelled(
    slurm: MiniSlurm, finished: Path, tmp_path: Path
) -> None:
    run = until_training(finished, tmp_path / "run")
    profile = slurm.folder / "profile.yaml"
    follower = start(run, "--stage", "serve,train,evaluate", "--cluster", profile, overrides=SETTINGS)
    wait_for(lambda: pids_running(run, "pipeline.training.launch"), "the training to start")
    tasks = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if is_task(path, run)]
    assert tasks
    for pid in tasks:
        os.kill(pid, signal.SIGKILL)
    assert follower.wait(120) == 1
    status = command("status", run).out
    assert "train        failed" in status
    assert "evaluate     cancelled" in status
    wait_for(lambda: not slurm.command("squeue", "-h").strip(), "the jobs to leave the queue")
    wait_for(lambda: not pids_running(run), "every process to end", 20)


def test_cancel_ends_the_jobs_and_those_that_wait_for_them(slurm: MiniSlurm, finished: Path, tmp_path: Path) -> None:
    run = until_training(finished, tmp_path / "run")
    profile = slurm.folder / "profile.yaml"
    follower = start(run, "--stage", "serve,train,evaluate", "--cluster", profile, overrides=SETTINGS)
    wait_for(lambda: pids_running(run, "-m pipeline.training.ppo", "-u"), "the training to start")
    cancelled = command("cancel", run)
    assert cancelled.status == 0, cancelled.err
    assert "cancelled serve, train, evaluate" in cancelled.out
    assert not slurm.command("squeue", "-h").strip()
    assert follower.wait(60) == 1
    wait_for(lambda: nothing_left(run), "every process to end", 20)
