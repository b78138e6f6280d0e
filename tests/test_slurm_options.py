"""What Slurm is asked for. tests/cluster has the jobs on a real Slurm."""

from __future__ import annotations

from pathlib import Path

from helpers_jobs import command

from pipeline.config import load
from pipeline.config.cluster import Cluster
from pipeline.scheduler.executor import depends_on
from pipeline.scheduler.options import slurm_options
from pipeline.scheduler.submission import Job, Submission

PROFILE = {
    "name": "site",
    "executor": "slurm",
    "account": "hpc1",
    "partition": "gpu",
    "extra": {"reservation": "course", "requeue": True},
    "default": {"time_min": 60, "cpus": 4, "mem_gb": 16},
    "stages": {"train": {"time_min": 600, "cpus": 64, "mem_gb": 400, "gpus": 8}},
}


def test_a_stage_asks_for_its_own_resources_and_the_sites_options() -> None:
    cluster = Cluster.model_validate(PROFILE)
    options = slurm_options(cluster, Job(("sft",)))
    assert (options["time"], options["mem"], options["cpus-per-task"]) == (60, "16G", 4)
    assert "gpus-per-node" not in options
    assert (options["account"], options["partition"]) == ("hpc1", "gpu")
    assert (options["reservation"], options["requeue"]) == ("course", True)
    assert options["kill-on-invalid-dep"] == "yes"


def test_gpus_and_memory_are_asked_for_in_the_sites_way() -> None:
    def options(**profile: object) -> dict[str, object]:
        return slurm_options(Cluster.model_validate({**PROFILE, **profile}), Job(("train",)))

    assert options(gpu_request="gres", gpu_type="a100")["gres"] == "gpu:a100:8"
    assert options(gpu_request="gres")["gres"] == "gpu:8"
    assert options(gpu_request="gpus")["gpus"] == "8"
    assert options(gpu_type="h100")["gpus-per-node"] == "h100:8"
    by_cpu = options(memory_request="mem-per-cpu")
    assert ("mem" in by_cpu, by_cpu["mem-per-cpu"]) == (False, "6400M")  # 400 GiB over 64 CPUs
    assert not {"mem", "mem-per-cpu"} & set(options(memory_request="none"))


def test_a_job_is_warned_before_its_limit_and_may_be_queued_again() -> None:
    options = slurm_options(Cluster.model_validate({**PROFILE, "extra": {}, "grace_s": 300}), Job(("train",)))
    assert (options["signal"], options["requeue"]) == ("USR2@300", True)
    options = slurm_options(Cluster.model_validate({**PROFILE, "extra": {}, "requeue": False}), Job(("train",)))
    assert "requeue" not in options
    assert options["no-requeue"] is True


def test_server_and_training_get_what_the_larger_one_needs() -> None:
    options = slurm_options(Cluster.model_validate(PROFILE), Job(("serve", "train")))
    assert (options["gpus-per-node"], options["mem"], options["time"]) == ("8", "400G", 600)


def test_a_job_depends_on_the_live_jobs_of_what_it_needs() -> None:
    jobs = (
        Job(("prefetch",), job_id="11"),
        Job(("convert",), ("prefetch",), job_id="12"),
        Job(("serve", "train"), ("prefetch", "sft", "convert"), job_id=None),
    )
    submission = Submission("s", "slurm", jobs)
    assert depends_on(submission, jobs[2]) == "afterok:11:12"  # sft is no part of it: done before
    assert depends_on(submission, jobs[0]) is None


def test_a_dry_run_for_a_cluster_shows_its_options_and_its_gpus(tmp_path: Path) -> None:
    profile = tmp_path / "site.yaml"
    profile.write_text(load.yaml.safe_dump(PROFILE))
    done = command("submit", "--preset", "demo", "--run-dir", tmp_path / "run", "--cluster", profile, "--dry-run")
    assert done.status == 0, done.err
    assert "#SBATCH --gpus-per-node=8" in done.out
    assert "CUDA_VISIBLE_DEVICES=7 " in done.out  # the last of the eight serves
    assert "zero2-bf16.yaml" in done.out
