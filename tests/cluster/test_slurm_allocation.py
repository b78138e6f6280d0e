"""slurm/pipeline.sbatch on a real Slurm: the chain inside one allocation, interrupted, cancelled, over two nodes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_cluster import CHAIN_SETTINGS, environment_of, held, profile
from helpers_jobs import (
    ROOT,
    clean_environment,
    command,
    nothing_left,
    pids_running,
    policy_sha256,
    start,
    until_training,
    wait_for,
)
from mini_slurm import MiniSlurm

from pipeline.run import endpoint
from pipeline.run.directory import RunDir
from pipeline.scheduler import submission as submissions

pytestmark = [pytest.mark.slurm, pytest.mark.triton, pytest.mark.chain]

SIZE = ("--cpus-per-task=16", "--mem=64G")


def sbatch(run: Path, *arguments: object, options: tuple[str, ...] = SIZE, script: Path | None = None) -> str:
    """Submit the batch script as a user does; returns the job's id. Its log is beside the run directory."""
    settings = [part for override in CHAIN_SETTINGS for part in ("--set", override)]
    script = script or ROOT / "slurm" / "pipeline.sbatch"
    argv = ["sbatch", "--parsable", f"--output={log_of(run)}", *options, str(script)]
    argv += ["--preset", "demo", "--run-dir", str(run), *settings, *(str(argument) for argument in arguments)]
    env = {**clean_environment(), "PYTHON": sys.executable}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=run.parent, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def log_of(run: Path) -> Path:
    return run.with_name(f"{run.name}.log")


def wait_for_end(slurm: MiniSlurm, job: str, run: Path, timeout_s: float = 300) -> str:
    """Wait until the job has left the queue; returns how the controller says that it ended."""
    wait_for(lambda: not slurm.command("squeue", "-h", "-j", job).strip(), f"job {job}; see {log_of(run)}", timeout_s)
    fields = slurm.command("scontrol", "--oneliner", "show", "job", job).split()
    return next(field.partition("=")[2] for field in fields if field.startswith("JobState="))


def test_the_whole_chain_runs_inside_one_allocation(slurm: MiniSlurm, finished: Path, tmp_path: Path) -> None:
    repository = tmp_path / "a re'po"  # the script finds it, though Slurm runs a copy elsewhere
    (repository / "slurm").mkdir(parents=True)
    shutil.copy(ROOT / "slurm" / "pipeline.sbatch", repository / "slurm")
    for name in ("pipeline", "containers", "model_store_templates"):
        (repository / name).symlink_to(ROOT / name)
    run = tmp_path / "it's a run"
    job = sbatch(run, script=repository / "slurm" / "pipeline.sbatch")
    wait_for(lambda: list(run.glob("checkpoints/*/step-00000004")), f"the first checkpoint; see {log_of(run)}", 300)
    with held(run) as ranks:
        (server,) = pids_running(run, "tritonserver --")
        assert {environment_of(pid)["CUDA_VISIBLE_DEVICES"] for pid in ranks} == {"0,1,2,3,4,5,6"}
        assert environment_of(server)["CUDA_VISIBLE_DEVICES"] == "7"
        assert len(slurm.command("squeue", "-h").splitlines()) == 1
    assert wait_for_end(slurm, job, run) == "COMPLETED"
    assert policy_sha256(run) == policy_sha256(finished)
    assert "held-out" in log_of(run).read_text()  # it says what came of it
    assert nothing_left(run)


@pytest.mark.parametrize("how", ["preempted by an urgent job", "requeued by hand"])
def test_an_interrupted_allocation_comes_back_and_ends_in_the_same_weights(
    slurm: MiniSlurm, finished: Path, tmp_path: Path, how: str
) -> None:
    run = until_training(finished, tmp_path / "run")
    by_hand = how == "requeued by hand"
    job = sbatch(run, *(("--force", "--stage", "convert,serve,train,evaluate") if by_hand else ()))
    wait_for(lambda: list(run.glob("checkpoints/*/step-00000004")), f"the first checkpoint; see {log_of(run)}")
    if by_hand:  # TERM without a warning, and a kill soon after
        slurm.command("scontrol", "requeue", job)
    else:
        urgent = ("--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=sleep 2")
        with held(run):
            slurm.command("sbatch", *urgent)
            wait_for((run / "control" / "STOP").exists, "the training to be told")
        wait_for(lambda: f"job {job} waits in the queue again" in log_of(run).read_text(), "the training to save", 180)
        train = next(line for line in command("status", run).out.splitlines() if " train " in line)
        assert "stopped" in train and f"interrupted by Slurm; goes on with job {job}" in train
    assert wait_for_end(slurm, job, run) == "COMPLETED"
    assert policy_sha256(run) == policy_sha256(finished)
    for stage in ("train", "convert") if by_hand else ("train",):  # what was forced, and was done before, is not redone
        assert sorted(path.name for path in (run / "stages" / stage / "attempts").iterdir()) == ["0001", "0002"]
    assert "resumed from" in RunDir(run).attempt("train", 2).joinpath("stdout.log").read_text()
    assert RunDir(run).outputs("evaluate") is not None
    assert not (run / "control" / "STOP").exists()
    wait_for(lambda: nothing_left(run), "every process to end", 20)


@pytest.mark.parametrize("how", ["scancel", "pipeline.cancel"])
def test_a_cancelled_allocation_leaves_nothing_and_does_not_come_back(
    slurm: MiniSlurm, finished: Path, tmp_path: Path, how: str
) -> None:
    run = until_training(finished, tmp_path / "run")
    job = sbatch(run)
    wait_for(lambda: pids_running(run, "-m pipeline.training.ppo", "-u"), f"the training to start; see {log_of(run)}")
    if how == "scancel":
        slurm.command("scancel", job)
    else:
        assert "cancelled serve, train, evaluate" in command("cancel", run).out
    assert wait_for_end(slurm, job, run, 120) in ("CANCELLED", "FAILED")
    wait_for(lambda: nothing_left(run), "every process to end", 20)
    status = command("status", run).out
    assert "train        cancelled" in status and "evaluate     cancelled" in status
    assert submissions.busy(RunDir(run)) is None


def test_a_training_uses_every_node_of_the_allocation(slurm: MiniSlurm, finished: Path, tmp_path: Path) -> None:
    run = until_training(finished, tmp_path / "run")
    short = ("--set", "train.total_steps=24", "--set", "train.eval_interval=12")
    job = sbatch(run, "--until", "train", *short, options=(*SIZE, "--nodes=2"))
    wait_for(lambda: list(run.glob("checkpoints/*/step-00000004")), f"the first checkpoint; see {log_of(run)}")
    with held(run):
        # A training begins when one of them answers.
        wait_for(lambda: len(endpoint.read_all(RunDir(run))) == 2, "both nodes' servers", 60)
        launchers = pids_running(run, "pipeline.training.launch")
        assert sorted(environment_of(pid)["SLURMD_NODENAME"] for pid in launchers) == ["n1", "n2"]
    assert wait_for_end(slurm, job, run) == "COMPLETED"
    assert RunDir(run).values("train")["steps"] == 24
    wait_for(lambda: nothing_left(run), "every process to end", 30)


def test_a_job_submits_the_chain_and_ends_whatever_its_own_variables_say(slurm: MiniSlurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = " ".join(f"--set '{override}'" for override in CHAIN_SETTINGS)
    site = profile(slurm.folder, "inside", setup=[f"env > '{tmp_path}'/$SLURM_JOB_NAME"])
    job_script = tmp_path / "job.sh"
    job_script.write_text(
        f"""#!/bin/bash
export TMPDIR=/tmp/$SLURM_JOB_ID TRITON_HOST=n9:8001/rm HH_PIPELINE_MEETING=another; mkdir $TMPDIR
export SLURM_MEM_PER_CPU=100 SLURM_MEM_PER_NODE=4096 SLURM_CPU_BIND=quiet,mask_cpu:0x3 SLURM_NTASKS=3
export SBATCH_TIMELIMIT=1 SBATCH_PARTITION=nowhere SRUN_CPUS_PER_TASK=63 PYTHON='{sys.executable}'
bash slurm/pipeline.sbatch --cluster {site} --preset demo --run-dir {run} --stage prefetch,sft {settings}
"""
    )
    argv = ("sbatch", "--parsable", "--wait", f"--chdir={ROOT}", f"--output={log_of(run)}", "--gpus-per-node=2")
    outer = slurm.command(*argv, str(job_script)).strip()
    assert "submitted: prefetch (" in log_of(run).read_text()
    submission = submissions.read(RunDir(run))
    assert submission is not None
    for each in submission.jobs:
        assert each.job_id is not None
        assert wait_for_end(slurm, each.job_id, run) == "COMPLETED"
        limit = slurm.command("squeue", "-h", "-t", "all", "-o", "%l %P %C", "-j", each.job_id).split()
        assert limit == ["30:00", "gpu", "4"]
    assert wait_for_end(slurm, outer, run) == "COMPLETED"
    assert RunDir(run).outputs("sft") is not None
    arrived = dict(line.partition("=")[::2] for line in (tmp_path / "hh-sft").read_text().splitlines())
    assert arrived["TRITON_HOST"] == "n9:8001/rm"
    for name in ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "HH_PIPELINE_MEETING"):  # the outer job's
        assert name not in arrived
    assert outer not in arrived.get("TMPDIR", "")


def test_stages_that_need_the_internet_run_on_the_login_node_before_the_rest_is_submitted(
    slurm: MiniSlurm, tmp_path: Path
) -> None:
    site = profile(slurm.folder, "offline", on_login_node=["prefetch", "sandbox"])
    run = tmp_path / "run"
    arguments = ("--cluster", site, "--stage", "prefetch,sft")
    follower = start(run, *arguments, "--no-follow", overrides=CHAIN_SETTINGS)
    wait_for(lambda: pids_running(run, "pipeline.data.prefetch"), "the work to start")
    assert slurm.empty()
    cancelled = command("cancel", run)
    assert "cancelled prefetch" in cancelled.out, cancelled.err
    assert follower.wait(120) == 1
    assert slurm.empty()  # nothing was submitted after it

    follower = start(run, *arguments, "--no-follow", overrides=CHAIN_SETTINGS)
    assert follower.wait(120) == 0
    assert RunDir(run).outputs("prefetch") is not None
    submission = submissions.read(RunDir(run))
    assert submission is not None
    assert (submission.executor, [job.stages for job in submission.jobs]) == ("slurm", [("sft",)])
    wait_for(lambda: RunDir(run).outputs("sft"), "the rest to run on the cluster", 120)
