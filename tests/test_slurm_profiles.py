"""The ready profiles in slurm/, and the sbatch scripts that they make: each is kept in tests/golden/<profile>/."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers_jobs import ROOT, command

from pipeline.config import load
from pipeline.config.cluster import Cluster, Resources
from pipeline.config.schema import Config
from pipeline.resources import resource_names
from pipeline.run.directory import RunDir
from pipeline.scheduler import script
from pipeline.scheduler.submit import group_jobs
from pipeline.stages.names import STAGES
from pipeline.stages.plan import Planned

SLURM = ROOT / "slurm"
GOLDEN = ROOT / "tests" / "golden"
PROFILES = resource_names("slurm", ".yaml")
REGENERATE = "UPDATE_GOLDEN=1 python -m pytest tests/test_slurm_profiles.py"


def configured(profile: str) -> Config:
    return load.resolve({**load.load_preset("gptj"), "preset": "gptj"}, (), profile)


def rendered(profile: str) -> dict[str, str]:
    """The whole chain's scripts, by the name of the job; the same on every machine."""
    config = configured(profile)
    jobs = group_jobs(config, [Planned(stage, "run", "") for stage in STAGES])
    run, code = RunDir(Path("/shared/runs/gptj")), Path("/shared/runs/gptj/code/0123456789abcdef")
    if config.cluster.executor != "slurm":
        return {}
    return {
        job.name: script.render(run, "20260101-000000-abcd", config.cluster, job, code, "/shared/venv/bin/python")
        for job in jobs
    }


@pytest.mark.parametrize("profile", PROFILES)
def test_the_scripts_of_a_profile_are_those_that_are_kept(profile: str) -> None:
    scripts, folder = rendered(profile), GOLDEN / profile
    if os.environ.get("UPDATE_GOLDEN"):
        for path in folder.glob("*.sbatch"):
            path.unlink()
        for name, text in scripts.items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.sbatch").write_text(text)
    kept = {path.stem: path.read_text() for path in folder.glob("*.sbatch")}
    assert scripts == kept, f"if the change is meant, write the files anew: {REGENERATE}"


def test_a_kept_script_is_one_that_a_shell_reads() -> None:
    scripts = sorted(GOLDEN.glob("*/*.sbatch"))
    assert len(scripts) >= 20
    for path in (*scripts, SLURM / "pipeline.sbatch"):
        done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_every_profile_fits_every_preset() -> None:
    for profile in PROFILES:
        assert configured(profile).cluster.name == profile


def test_stages_without_gpus_ask_for_none_and_trainings_for_what_they_use() -> None:
    for profile in PROFILES:
        cluster = configured(profile).cluster
        if cluster.executor != "slurm":
            continue
        gpus = {stage: cluster.resources(stage).gpus for stage in STAGES}
        assert gpus == {
            **{"prefetch": 0, "sandbox": 0, "convert": 0, "serve": 1, "evaluate": 1},
            **{"sft": 8, "reward-model": 8, "train": 8},
        }, profile
        assert [stage for stage in STAGES if stage not in cluster.stages] == [], profile


def documented_keys(text: str, pattern: str) -> list[str]:
    return re.findall(pattern, text, flags=re.MULTILINE)


def test_the_template_has_every_key_with_a_sentence() -> None:
    text = (SLURM / "template.yaml").read_text("utf-8")
    keys = [key for key in documented_keys(text, r"^(?:# )?([a-z_]+):") if key in Cluster.model_fields]
    assert sorted(keys) == sorted(Cluster.model_fields)
    for key in keys:
        before = re.search(rf"^(.*)\n(?:# )?{key}:(?: |$)", text, flags=re.MULTILINE)
        assert before is not None
        assert re.fullmatch(r"# .*[.:;,\w)]", before[1]), key
    default = re.search(r"^default: (.*)$", text, flags=re.MULTILINE)
    assert default is not None
    assert set(yaml.safe_load(default[1])) == set(Resources.model_fields)
    assert tuple(documented_keys(text, r"^  ([a-z-]+): \{")) == STAGES


def test_the_templates_examples_are_valid() -> None:
    """Every commented key, taken in by removing its "# ", passes the checks: all of them at once."""
    keys = "|".join(Cluster.model_fields)
    text = re.sub(rf"^# ((?:{keys}): )", r"\1", (SLURM / "template.yaml").read_text("utf-8"), flags=re.MULTILINE)
    tree = yaml.safe_load(text)
    assert set(tree) == set(Cluster.model_fields)
    cluster = Cluster.model_validate(tree)
    assert cluster.on_login_node == ("prefetch", "sandbox")
    assert Cluster.model_validate(yaml.safe_load((SLURM / "template.yaml").read_text("utf-8"))).account is None


def test_the_readme_lists_the_profiles_that_there_are() -> None:
    rows = re.findall(r"^\| \[(\S+)\]\((\S+)\) \| `(\w+)` \| \S", (SLURM / "README.md").read_text(), re.MULTILINE)
    expected = {name: (f"{name}.yaml", configured(name).cluster.executor) for name in PROFILES}
    assert {name: (file, executor) for name, file, executor in rows} == expected


def test_outside_of_an_allocation_its_profile_is_refused_in_one_line(tmp_path: Path) -> None:
    arguments = ("--preset", "demo", "--run-dir", tmp_path / "run", "--cluster", "in-allocation")
    done = command("submit", *arguments)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "there is no Slurm allocation around this command; start it by sbatch slurm/pipeline.sbatch" in done.err
    on_login = command("submit", *arguments, env={"SLURM_JOB_ID": "7"})
    assert (on_login.status, on_login.err.count("\n")) == (2, 1)
    assert "put srun --overlap --nodes=1 --ntasks=1 in front of the command" in on_login.err
    inside = command("submit", *arguments, "--no-follow", env={"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"})
    assert "--no-follow: jobs inside an allocation end with the command" in inside.err
    assert not (tmp_path / "run").exists()


def batch_script(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the batch script as Slurm does, from a spool folder, with a python that says how it was called."""
    spool = folder / "spool"
    spool.mkdir(exist_ok=True)
    (spool / "slurm_script").write_text((SLURM / "pipeline.sbatch").read_text())
    fake = folder / "bin"
    fake.mkdir(exist_ok=True)
    for name, body in (("python3", 'printf "%s|" "$PYTHONPATH" "$@"'), ("scontrol", 'echo "$SAID"')):
        (fake / name).write_text(f"#!/bin/bash\n{body}\n")
        (fake / name).chmod(0o755)
    env = {"PATH": f"{fake}:{os.environ['PATH']}", "SAID": "", **environment}
    argv = ["bash", str(spool / "slurm_script"), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, check=False, env=env, cwd=folder)


def test_the_batch_script_finds_the_repository_wherever_it_was_submitted(tmp_path: Path) -> None:
    repository = tmp_path / "my re'po"
    (repository / "pipeline").mkdir(parents=True)
    (repository / "pipeline" / "submit.py").touch()
    expected = f"{repository}|-u|-m|pipeline.submit|--cluster|in-allocation|--run-dir|a b|"
    arguments = ("--run-dir", "a b")
    said = f"   JobId=7\n   Command={repository}/slurm/pipeline.sbatch --run-dir a b\n   WorkDir=/tmp\n"
    elsewhere = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    below = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(repository / "runs" / "deep")}
    assert batch_script(tmp_path, *arguments, SAID=said, **elsewhere).stdout == expected
    assert batch_script(tmp_path, *arguments, **below).stdout == expected
    assert batch_script(tmp_path, *arguments, HH_PIPELINE_HOME=str(repository), **elsewhere).stdout == expected
    wrong = batch_script(tmp_path, HH_PIPELINE_HOME=str(tmp_path), **elsewhere)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert "no pipeline/submit.py in it" in wrong.stderr


def test_the_batch_script_takes_the_repositorys_python_then_the_one_on_the_path(tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    for folder in (repository / "pipeline", repository / ".venv" / "bin"):
        folder.mkdir(parents=True)
    (repository / "pipeline" / "submit.py").touch()
    for path in (repository / ".venv" / "bin" / "python", tmp_path / "other python"):
        path.write_text(f"#!/bin/bash\necho {path.name}\n")
        path.chmod(0o755)
    home = {"HH_PIPELINE_HOME": str(repository)}
    assert batch_script(tmp_path, **home).stdout == "python\n"
    assert batch_script(tmp_path, **home, PYTHON=str(tmp_path / "other python")).stdout == "other python\n"
    (repository / ".venv" / "bin" / "python").unlink()
    assert batch_script(tmp_path, **home).stdout.startswith(f"{repository}|-u|-m|pipeline.submit|")


def test_the_examples_of_the_page_on_profiles_are_profiles() -> None:
    text = (ROOT / "docs" / "profiles.md").read_text("utf-8")
    blocks = re.findall(r"^    name: .*(?:\n    .*)+", text, flags=re.MULTILINE)
    names = [Cluster.model_validate(yaml.safe_load(block)).name for block in blocks]
    assert names == ["university", "spot"]
