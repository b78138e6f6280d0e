"""Handing jobs to sbatch, a stand-in here: what it refuses, what may pass, and paths that a shell could misread."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from helpers_jobs import submit as submit_command

from pipeline.config import load
from pipeline.config.cluster import Cluster
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.scheduler import script
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.executor import passed_on
from pipeline.scheduler.state import recorded_state
from pipeline.scheduler.submission import Job
from pipeline.scheduler.submit import divide, group_jobs, submit
from pipeline.stages.names import STAGES
from pipeline.stages.plan import Planned

LIMIT = (
    "sbatch: error: AssocMaxSubmitJobLimit\n"
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size)"
)
PROFILE = "name: site\nexecutor: slurm\n"


def config_for(folder: Path, profile: str = PROFILE) -> Config:
    (folder / "site.yaml").write_text(profile)
    return load.resolve({**load.load_preset("demo"), "preset": "demo"}, (), str(folder / "site.yaml"))


def fake_slurm(monkeypatch: pytest.MonkeyPatch, folder: Path, sbatch: str) -> Path:
    """sbatch and scancel that note their calls; `sbatch` is what it does at its call number $n (from 1)."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    calls = folder / "calls"
    bodies = {
        "sbatch": f'n=$(grep -c "^sbatch" {calls})\n{sbatch}\necho "Submitted batch job $((100 + n))"',
        "scancel": "",
        "squeue": "",
    }
    for name, body in bodies.items():
        path = bin_folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {calls}\n{body}\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    monkeypatch.setattr(script, "RETRY_S", (0.01, 0.01))
    monkeypatch.setattr(submissions, "_asked", {})
    monkeypatch.setattr(submissions, "_runs", {})
    return calls


def called(calls: Path, name: str) -> list[str]:
    return [line for line in calls.read_text().splitlines() if line.startswith(name)]


PLAN = [Planned(stage, "run", "") for stage in STAGES]


def test_a_full_queue_is_waited_for_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_slurm(monkeypatch, tmp_path, f'if [ $n = 2 ] || [ $n = 3 ]; then echo "{LIMIT}" >&2; exit 1; fi')
    run = RunDir(tmp_path / "run")
    submission = submit(run, config_for(tmp_path), PLAN, ())
    assert [job.job_id for job in submission.jobs] == ["101", "104", "105", "106", "107", "108", "109"]
    assert called(calls, "scancel") == []
    assert list(run.root.glob("jobs/*/.submission_file_*")) == []


def test_a_queue_that_stays_full_ends_the_submission_and_takes_back_what_was_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_slurm(monkeypatch, tmp_path, f'if [ $n -ge 3 ]; then echo "{LIMIT}" >&2; exit 1; fi')
    run = RunDir(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        submit(run, config_for(tmp_path), PLAN, ())
    assert str(caught.value).startswith("job reward-model: sbatch: error: AssocMaxSubmitJobLimit; sbatch: error: Batch")
    assert "\n" not in str(caught.value)
    assert len(called(calls, "sbatch")) == 2 + 3
    assert called(calls, "scancel") == ["scancel 101 102"]
    for stage in STAGES:
        state = recorded_state(run, stage)
        assert state is not None
        assert (state.state, state.reason[:32]) == ("cancelled", "not all jobs could be submitted:")


def test_a_refusal_that_will_not_pass_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "sbatch: error: invalid partition specified: gpuu"
    calls = fake_slurm(monkeypatch, tmp_path, f'if [ $n = 3 ]; then echo "{said}" >&2; exit 1; fi')
    with pytest.raises(UserError, match=r"^job reward-model: sbatch: error: invalid partition specified"):
        submit(RunDir(tmp_path / "run"), config_for(tmp_path), PLAN, ())
    assert len(called(calls, "sbatch")) == 3
    assert called(calls, "scancel") == ["scancel 101 102"]


def test_when_scancel_refuses_too_both_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_slurm(monkeypatch, tmp_path, 'if [ $n = 2 ]; then echo "sbatch: error: no" >&2; exit 1; fi')
    (tmp_path / "bin" / "scancel").write_text("#!/bin/bash\necho 'scancel: error: away' >&2; exit 1\n")
    with pytest.raises(UserError, match=r"sbatch: error: no .*in the queue still: scancel 101: scancel: error: away"):
        submit(RunDir(tmp_path / "run"), config_for(tmp_path), PLAN, ())


def test_ctrl_c_while_the_queue_is_full_takes_back_what_was_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_slurm(monkeypatch, tmp_path, f'if [ $n = 2 ]; then echo "{LIMIT}" >&2; exit 1; fi')
    monkeypatch.setattr(script, "RETRY_S", (120.0,))

    def press() -> None:
        while not calls.exists() or len(called(calls, "sbatch")) < 2:
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        submit(RunDir(tmp_path / "run"), config_for(tmp_path), PLAN, ())
    assert called(calls, "scancel") == ["scancel 101"]


INSIDE = {
    **{"SLURM_JOB_ID": "4711", "SLURM_TMPDIR": "/local/me", "SBATCH_PARTITION": "x", "SUBMITIT_EXECUTOR": "slurm"},
    **{"CUDA_VISIBLE_DEVICES": "0,1", "ROCR_VISIBLE_DEVICES": "0,1", "GPU_DEVICE_ORDINAL": "0,1"},
    **{"NVIDIA_VISIBLE_DEVICES": "all", "TMPDIR": "/scratch/job.4711/tmp"},
    **{
        "HH_PIPELINE_MEETING": "s0",
        "HH_PIPELINE_FOLLOWS": "1",
        "HH_PIPELINE_RUN": "/runs/x",
        "HH_PIPELINE_FORCED": "1",
    },
}
OWN = {"TRITON_HOST": "n9:8001/rm", "HH_PIPELINE_HOME": "/code", "SLURM_CONF": "/etc/slurm.conf", "HF_HOME": "/hub"}


def test_what_belongs_to_a_surrounding_job_does_not_arrive_and_what_is_the_users_own_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_slurm(monkeypatch, tmp_path, f"env > '{tmp_path}/arrived'")
    for name, value in {**INSIDE, **OWN}.items():
        monkeypatch.setenv(name, value)
    submit(RunDir(tmp_path / "run"), config_for(tmp_path), [Planned("sft", "run", "")], ())
    arrived = dict(line.partition("=")[::2] for line in (tmp_path / "arrived").read_text().splitlines())
    assert arrived.keys() & INSIDE.keys() == set()
    assert {name: arrived.get(name) for name in OWN} == OWN


def test_only_a_surrounding_jobs_own_temporary_folder_stays_behind() -> None:
    def tmpdir(folder: str) -> str | None:
        return passed_on({"SLURM_JOB_ID": "47", "SLURM_TMPDIR": "/local/me", "TMPDIR": folder}).get("TMPDIR")

    assert [tmpdir(folder) for folder in ("/local/me", "/tmp/47", "/tmp/me_47.0")] == [None] * 3
    assert [tmpdir(folder) for folder in ("/home/me/tmp", "/tmp/471")] == ["/home/me/tmp", "/tmp/471"]


def test_on_a_login_node_and_in_jobs_of_this_very_node_the_gpus_stay_those_that_are_visible() -> None:
    devices = {"CUDA_VISIBLE_DEVICES": "3", "TMPDIR": "/tmp/47"}
    assert passed_on(devices) == devices
    assert passed_on({**devices, "SLURM_JOB_ID": "47", "HH_PIPELINE_STAGE": "sft"}, here=True) == devices


@pytest.mark.parametrize("name", ["a 0", 'a"=0"', "a'; echo foo", "a $HOME `id` & # b", "ümlaut"])
def test_paths_mean_in_a_script_what_they_are(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    (folder / "code").mkdir(parents=True)
    cluster = Cluster.model_validate({"executor": "slurm", "environment": {"HH_SITE": name}})
    python = str(folder / "python")
    text = script.render(RunDir(folder), "s", cluster, Job(("sft",)), folder / "code", python)
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin" / "srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\0" "$PWD" "$PYTHONPATH" "$HH_SITE" "$@"\n')
    srun.chmod(0o755)
    env = {"PATH": f"{srun.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", text], capture_output=True, check=True, env=env)
    assert done.stderr == b""
    words = done.stdout.decode().split("\0")
    assert words[:3] == [str(folder), str(folder / "code"), name]
    assert words[words.index("--output") + 1] == f"{folder}/jobs/s-sft/%j_%t_log.out"
    assert words[words.index(python) :] == [
        *(python, "-u", "-m", "pipeline.stages.job"),
        *(str(folder), "sft", "s", ""),
    ]


@pytest.mark.parametrize("name", ["a\n0", "a\\b", "50 %j", "bell\a"])
def test_paths_that_a_script_cannot_carry_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    done = submit_command(tmp_path / name, "--stage", "prefetch")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert done.err.startswith("error: --run-dir '")
    assert not (tmp_path / name).exists()


def test_extra_options_win_and_false_takes_one_away(tmp_path: Path) -> None:
    profile = {"executor": "slurm", "extra": {"requeue": False, "mem": "7G", "exclusive": True, "comment": "a 'b'"}}
    text = script.render(RunDir(tmp_path), "s", Cluster.model_validate(profile), Job(("sft",)), tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --mem=7G", "#SBATCH --exclusive", "#SBATCH --comment='a '\"'\"'b'\"'\"''"} <= set(lines)
    assert not any("requeue" in line for line in lines)


def test_a_variable_must_have_a_variables_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^cluster.environment: 'A B' is no variable's name"):
        config_for(tmp_path, PROFILE + "environment: {A B: c}\n")


def test_trainings_of_one_allocation_take_turns_on_its_gpus() -> None:
    config = load.resolve({**load.load_preset("demo"), "preset": "demo"}, ("reward_model.base=model",), "in-allocation")
    waits = {job.name: job.waits_for for job in group_jobs(config, PLAN)}
    assert waits["reward-model"] == ("prefetch", "sft")
    assert waits["sandbox"] == ()
    apart = load.resolve({**load.load_preset("demo"), "preset": "demo"}, ("reward_model.base=model",), "local")
    assert {job.name: job.waits_for for job in group_jobs(apart, PLAN)}["reward-model"] == ("prefetch",)


def test_what_runs_on_the_login_node_is_no_job_of_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(tmp_path, PROFILE + "on_login_node: [prefetch, sandbox]\n")
    here, rest = divide(config, [Planned("prefetch", "run", ""), Planned("sandbox", "skip", ""), *PLAN[1:3]])
    assert [planned.stage for planned in here] == ["prefetch"]
    assert [planned.stage for planned in rest] == ["sandbox", "sft", "reward-model"]
    assert [job.waits_for for job in group_jobs(config, rest)] == [(), ("sft",)]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert divide(config, PLAN)[0]  # a shell of salloc may well be on the login node
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    with pytest.raises(UserError, match=r"prefetch,sandbox cannot run on n1, a node of job 7; run --stage prefetch"):
        divide(config, PLAN)


def test_only_slurm_has_a_login_node(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'^cluster.on_login_node: cluster.executor = "local" runs every stage where'):
        config_for(tmp_path, "on_login_node: [prefetch]\n")
    with pytest.raises(UserError, match=r"^cluster.on_login_node.0: input should be 'prefetch' or 'sandbox'"):
        config_for(tmp_path, PROFILE + "on_login_node: [train]\n")


def test_a_dry_run_shows_what_runs_here(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(PROFILE + "on_login_node: [prefetch]\n")
    done = submit_command(tmp_path / "run", "--cluster", tmp_path / "site.yaml", "--dry-run", "--until", "sft")
    assert done.status == 0, done.err
    assert "job prefetch (here, before anything is submitted)" in done.out
    assert "job sft (slurm)" in done.out
    assert "hh-prefetch" not in done.out


@pytest.mark.chain
def test_a_failure_on_the_login_node_ends_it_before_anything_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_slurm(monkeypatch, tmp_path, "")
    calls.touch()
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "train.jsonl").write_text('{"chosen": "no turns", "rejected": "none"}\n')
    (rows / "test.jsonl").write_text("")
    (tmp_path / "site.yaml").write_text(PROFILE + "on_login_node: [prefetch]\n")
    arguments = ("--stage", "prefetch,sft", "--set", f"data.source={rows}", "--cluster", tmp_path / "site.yaml")
    done = submit_command(tmp_path / "run", *arguments, "--no-follow")
    assert done.status == 1
    assert "error: prefetch:" in done.err and "train.jsonl" in done.err
    assert "nothing else has been submitted" in done.err
    assert called(calls, "sbatch") == []
    state = recorded_state(RunDir(tmp_path / "run"), "prefetch")
    assert state is not None and state.state == "failed"
