"""python -m pipeline.doctor on this machine, whatever it is."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from helpers_jobs import command

from pipeline.config import load
from pipeline.site.engine import EngineFacts
from pipeline.site.examine import Site
from pipeline.site.gpus import GpuFacts
from pipeline.site.machine import MachineFacts
from pipeline.site.slurm import COMMANDS, SlurmFacts

TOPICS = ["Machine and Python", "Slurm", "Reward server's engine", "GPUs", "Folders", "Network"]


@pytest.fixture
def no_slurm() -> dict[str, str]:
    """A PATH without a single command: no Slurm, no engine, no driver, whatever this machine has."""
    return {"PATH": "/nonexistent"}


def unwrapped(text: str) -> str:
    """Without the line breaks that depend on the terminal's width."""
    return " ".join(text.split())


def test_the_demo_on_this_machine_is_examined_topic_by_topic(tmp_path: Path, no_slurm: dict[str, str]) -> None:
    done = command("doctor", "--preset", "demo", "--run-dir", tmp_path / "run", env=no_slurm)
    assert done.status == (1 if "✗" in done.out else 0), done.err
    assert [line for line in done.out.splitlines() if line in TOPICS] == TOPICS
    assert "none here, and profile local needs none" in unwrapped(done.out)
    assert f"run directory ({tmp_path / 'run'})" in unwrapped(done.out)
    assert max(map(len, done.out.splitlines()[1:])) <= 120
    assert not (tmp_path / "run").exists()


def test_findings_as_json_say_the_same(tmp_path: Path, no_slurm: dict[str, str]) -> None:
    done = command("doctor", "--preset", "demo", "--run-dir", tmp_path, "--json", env=no_slurm)
    findings = json.loads(done.out)
    assert {each["topic"] for each in findings} == set(TOPICS)
    assert {each["level"] for each in findings} <= {"ok", "warn", "fail", "unknown"}
    assert done.status == any(each["level"] == "fail" for each in findings)
    assert all(each["remedy"] for each in findings if each["level"] == "fail")


def test_a_slurm_profile_on_a_machine_without_slurm_fails_with_the_remedy(
    tmp_path: Path, no_slurm: dict[str, str]
) -> None:
    done = command("doctor", "--preset", "demo", "--cluster", "single-node-8gpu", "--run-dir", tmp_path, env=no_slurm)
    assert done.status == 1
    assert "✗ cluster.executor: slurm (profile single-node-8gpu), but there is no sbatch on PATH" in unwrapped(done.out)
    assert "go to a login node" in unwrapped(done.out)


def test_a_closed_network_costs_a_few_seconds_and_is_said(tmp_path: Path, no_slurm: dict[str, str]) -> None:
    closed = {**no_slurm, "https_proxy": "http://127.0.0.1:9", "WANDB_API_KEY": "0123secret"}
    started = time.monotonic()
    done = command("doctor", "--preset", "125M", "--run-dir", tmp_path, env=closed)
    assert time.monotonic() - started < 30
    assert done.status == 1
    assert "cannot be reached: Connection refused" in unwrapped(done.out)
    assert "https_proxy set here" in unwrapped(done.out)
    assert "0123secret" not in done.out + done.err


def test_a_secret_of_the_profile_or_environment_is_not_printed_as_json_either(
    tmp_path: Path, no_slurm: dict[str, str]
) -> None:
    secret = {**no_slurm, "https_proxy": "http://me:0123secret@127.0.0.1:9"}
    assert "0123secret" not in command("doctor", "--preset", "125M", "--run-dir", tmp_path, "--json", env=secret).out


def test_a_drafted_profile_loads_and_is_never_overwritten(tmp_path: Path, no_slurm: dict[str, str]) -> None:
    target = tmp_path / "my cluster.yaml"
    done = command("doctor", "--preset", "demo", "--run-dir", tmp_path, "--write-profile", target, env=no_slurm)
    assert done.status in (0, 1), done.err
    assert load.resolve(load.load_preset("demo"), cluster=str(target)).cluster.executor == "local"
    before = target.read_text()
    again = command("doctor", "--preset", "demo", "--run-dir", tmp_path, "--write-profile", target, env=no_slurm)
    assert again.status == 2
    assert "exists already and is not overwritten" in again.err
    assert target.read_text() == before


def test_wrong_arguments_are_one_line(tmp_path: Path) -> None:
    unknown = command("doctor", "--cluster", "nowhere")
    assert (unknown.status, unknown.err.count("\n")) == (2, 1)
    assert "no such file or profile" in unknown.err
    both = command("doctor", "--cluster", "local", "--write-profile", tmp_path / "x.yaml")
    assert both.status == 2
    assert not (tmp_path / "x.yaml").exists()


def test_a_run_that_exists_is_examined_with_its_own_configuration(tmp_path: Path, no_slurm: dict[str, str]) -> None:
    config = load.resolve({**load.load_preset("demo"), "preset": "demo"}, ["train.tracker=wandb"])
    (tmp_path / "config.yaml").write_text(load.dump(config))
    environ = {**no_slurm, "WANDB_MODE": "offline", "CONFIG_NAME": "6B"}
    assert "WANDB_MODE=offline" in command("doctor", "--run-dir", tmp_path, env=environ).out


def test_a_profile_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    from pipeline.doctor import write_profile
    from pipeline.errors import UserError

    machine = MachineFacts("n1", "Linux", 1, 1)
    site = Site(SlurmFacts(missing=COMMANDS), EngineFacts(), GpuFacts(), machine)
    target = tmp_path / "profile.yaml"
    write_profile(site, target)
    assert os.listdir(tmp_path) == ["profile.yaml"]
    target.write_text("mine")
    with pytest.raises(UserError, match="not overwritten"):
        write_profile(site, target)
    assert target.read_text() == "mine"
