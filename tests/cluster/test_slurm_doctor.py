"""The doctor on a real Slurm: it finds the nodes, drafts a profile that sbatch accepts, and sees what is impossible."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_jobs import command
from mini_slurm import MiniSlurm

pytestmark = [pytest.mark.slurm]

OF_SLURM = ("Slurm", "Cluster profile")


def examine(folder: Path, *arguments: object) -> list[dict[str, Any]]:
    """What the doctor finds of Slurm and the profile; the rest depends on the machine."""
    done = command("doctor", "--preset", "demo", "--run-dir", folder / "run", "--json", *arguments)
    assert done.status in (0, 1), done.err
    return [each for each in json.loads(done.out) if each["topic"] in OF_SLURM]


def lines(findings: list[dict[str, Any]], level: str) -> list[str]:
    return [f"{each['what']} -> {each['remedy']}" for each in findings if each["level"] == level]


@pytest.fixture
def short(slurm: MiniSlurm) -> Iterator[str]:
    """A partition whose jobs end after an hour."""
    slurm.command("scontrol", "create", "PartitionName=short", "Nodes=n1,n2", "MaxTime=60")
    yield "short"
    slurm.command("scontrol", "delete", "PartitionName=short")


def test_a_profile_is_drafted_that_sbatch_accepts(slurm: MiniSlurm, tmp_path: Path) -> None:
    target = tmp_path / "drafted.yaml"
    findings = examine(tmp_path, "--write-profile", target)
    profile = yaml.safe_load(target.read_text())
    assert (profile["partition"], profile["gpu_type"], profile["stages"]["train"]["gpus"]) == ("gpu", "a100", 8)
    assert profile["grace_s"] == 60  # the partition's GraceTime
    assert any("partition gpu (this profile's): 2 nodes, GPUs a node: 8 a100" in line for line in lines(findings, "ok"))
    assert lines(examine(tmp_path, "--cluster", target), "fail") == []
    accepted = [line for line in lines(findings, "ok") if line.startswith("sbatch accepts")]
    assert len(accepted) == 1
    assert "serve+train" in accepted[0]
    assert slurm.empty()  # nothing was submitted
    assert not (tmp_path / "run").exists()


def test_every_impossible_wish_is_found_with_its_key_and_remedy(slurm: MiniSlurm, short: str, tmp_path: Path) -> None:
    profile = {
        "name": "impossible",
        "executor": "slurm",
        "partition": short,
        "constraint": "a100",
        "default": {"time_min": 30, "cpus": 8, "mem_gb": 32},
        "stages": {"train": {"time_min": 2880, "cpus": 64, "mem_gb": 400, "gpus": 16}},
    }
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump(profile))
    found = lines(examine(tmp_path, "--cluster", path), "fail")
    for words in (
        "cluster.constraint: no node of partition short has the feature a100 -> its nodes have none",
        "cluster.stages.train.gpus: 16, but no node of partition short has more than 8 -> ask for at most 8",
        "cluster.stages.train.time_min: 2880, but partition short ends jobs after 60 min -> ask for at most 60",
        "Invalid feature specification -> look at cluster.constraint",
    ):
        assert any(words in line for line in found), (words, found)
    path.write_text(yaml.safe_dump({**profile, "partition": "shor"}))
    found = lines(examine(tmp_path, "--cluster", path), "fail")
    assert "cluster.partition: Slurm has no partition shor (did you mean 'short'?)" in found[0]
    assert "look at cluster.partition" in found[1]
    assert slurm.empty()


def test_the_doctor_runs_inside_a_job_too(slurm: MiniSlurm, tmp_path: Path) -> None:
    """A surrounding job's variables would change what sbatch tests: SLURM_* must not reach it."""
    inside = {"SLURM_JOB_ID": "1", "SBATCH_PARTITION": "nowhere", "SBATCH_CONSTRAINT": "nothing"}
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump({"name": "mini", "executor": "slurm", "partition": "gpu"}))
    done = command("doctor", "--preset", "demo", "--run-dir", tmp_path, "--cluster", path, env=inside)
    said = " ".join(done.out.split())  # lines break where the terminal ends
    assert "sbatch accepts the jobs of prefetch" in said, said
    assert "inside Slurm job 1" in said


def test_a_controller_that_is_away_is_said_within_seconds(
    slurm: MiniSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines_of_conf = (slurm.folder / "slurm.conf").read_text().splitlines()
    port = next(line for line in lines_of_conf if line.startswith("SlurmctldPort="))
    wrong = "\n".join(line.replace(port, "SlurmctldPort=9") for line in lines_of_conf)
    (tmp_path / "slurm.conf").write_text(wrong + "\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump({"name": "mini", "executor": "slurm"}))
    (fault,) = lines(examine(tmp_path, "--cluster", path), "fail")
    assert "the controller does not answer" in fault
