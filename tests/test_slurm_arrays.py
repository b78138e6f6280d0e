"""Points of a sweep as job arrays: one sbatch for each job of the chain, task i being point i's, sbatch a stand-in."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from test_slurm_submission import PROFILE, called, fake_slurm

from pipeline.config import load
from pipeline.config.cluster import Cluster
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run import bad_nodes
from pipeline.run.directory import RunDir
from pipeline.scheduler import arrays, queue, script, slurm
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.arrays import Member
from pipeline.scheduler.executor import corresponds_to, depends_on
from pipeline.scheduler.state import recorded_state
from pipeline.scheduler.submission import Job, Submission
from pipeline.stages.plan import Planned

NAMES = ("seed=1", "seed=2", "seed=3")


def config(folder: Path, *overrides: str, profile: str = PROFILE) -> Config:
    (folder / "site.yaml").write_text(profile)
    return load.resolve({**load.load_preset("demo"), "preset": "demo"}, overrides, str(folder / "site.yaml"))


def members(folder: Path, stages: Sequence[str] = ("prefetch", "sft")) -> list[Member]:
    plan = tuple(Planned(stage, "run", "") for stage in stages)
    return [Member(RunDir(folder / "s" / name), config(folder, name), plan) for name in NAMES]


def ids(folder: Path, name: str) -> list[str | None]:
    submission = submissions.read(RunDir(folder / "s" / name))
    assert submission is not None
    return [job.job_id for job in submission.jobs]


# The script


@pytest.mark.parametrize("name", ["a sweep", "it's $HOME"])
def test_a_task_finds_its_run_by_its_number(tmp_path: Path, name: str) -> None:
    array = tmp_path / name / "arrays" / "s1"
    for task, point in enumerate(NAMES):
        (tmp_path / name / point / "code" / "c0").mkdir(parents=True)
        (array / "sft").mkdir(parents=True, exist_ok=True)
        (array / str(task)).symlink_to(tmp_path / name / point)
    target = arrays.target(array, "s1", Job(("sft",)), "c0", (), tasks=3, at_once=2)
    text = script.render_for(target, "s1", Cluster(executor="slurm", retries=1), Job(("sft",)), "/bin/py")
    assert "#SBATCH --array=0-2%2\n" in text and "sbatch --array=TASK THIS_FILE" in text

    (tmp_path / "srun").write_text(
        '#!/bin/bash\nprintf "%s\\0" "$PWD" "$PYTHONPATH" "$SUBMITIT_EXECUTOR $HH_PIPELINE_TASK" "$@"\n'
    )
    (tmp_path / "srun").chmod(0o755)
    ids = {"SLURM_JOB_ID": "45", "SLURM_ARRAY_JOB_ID": "43", "SLURM_ARRAY_TASK_ID": "1"}
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **ids}
    done = subprocess.run(["bash", "-c", text], capture_output=True, check=True, env=env)
    words = done.stdout.decode().split("\0")
    run = f"{tmp_path}/{name}/seed=2"
    assert words[:3] == [run, f"{run}/code/c0", "slurm 45:43_1"]
    assert words[words.index("/bin/py") :] == ["/bin/py", "-u", "-m", "pipeline.stages.job", run, "sft", "s1", ""]
    # The logs are in the task's own run, under the name that its job is known by.
    assert words[words.index("--error") + 1] == f"{array}/%a/jobs/s1-sft/%A_%a_%t_log.err"

    none = subprocess.run(
        ["bash", "-c", text], capture_output=True, check=False, env=env | {"SLURM_ARRAY_TASK_ID": "3"}
    )
    assert (none.returncode, none.stdout) == (1, b"")
    assert none.stderr.decode().startswith(f"error: {array}/3: names no run;")
    (tmp_path / name / "seed=2/code/c0").rmdir()
    gone = subprocess.run(["bash", "-c", text], capture_output=True, check=False, env=env)
    assert (gone.returncode, gone.stdout) == (1, b"")
    assert gone.stderr.decode().startswith(f"error: {run}/code/c0: the code that was submitted is gone;")


def test_a_task_waits_for_the_task_of_its_number() -> None:
    jobs = (
        Job(("prefetch",), job_id="11_1"),
        Job(("sft",), ("prefetch",), job_id="12_1"),
        Job(("serve", "train"), ("prefetch", "sft", "convert")),
    )
    submission = Submission("s", "slurm", jobs, array="/sweep/arrays/s", task=1)
    assert corresponds_to(submission, jobs[2]) == "aftercorr:11:12"  # convert is no part of it: done before
    assert depends_on(submission, jobs[2]) == "afterok:11_1:12_1"
    assert corresponds_to(submission, jobs[0]) is None and depends_on(submission, jobs[0]) is None
    apart = Submission("s", "slurm", (jobs[0], Job(("serve",), job_id="13_1")), array="/sweep/arrays/s", task=1)
    trains = Job(("train",), ("prefetch",), ("serve",))
    assert depends_on(apart, trains) == "afterok:11_1,after:13_1"


@pytest.mark.parametrize(
    ("environ", "job"),
    [
        ({"SLURM_JOB_ID": "45", "HH_PIPELINE_TASK": "45:43_0"}, "43_0"),
        ({"SLURM_JOB_ID": "43", "HH_PIPELINE_TASK": "43:43_2"}, "43_2"),  # 43 is the whole array, too
        ({"SLURM_JOB_ID": "51", "HH_PIPELINE_TASK": "45:43_0", "SLURM_ARRAY_TASK_ID": "0"}, "51"),  # begun inside of it
        ({"SLURM_JOB_ID": "51"}, "51"),
    ],
)
def test_a_task_knows_itself_by_array_and_number(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], job: str
) -> None:
    for name, value in ({"SUBMITIT_EXECUTOR": "slurm"} | environ).items():
        monkeypatch.setenv(name, value)
    assert slurm.job_id() == job


# Which points share arrays


def test_points_with_the_same_jobs_share_arrays_and_the_others_do_not(tmp_path: Path) -> None:
    first, second, third = members(tmp_path)
    assert arrays.alike([first, second, third]) == [[first, second, third]]
    sft_only = members(tmp_path, ("sft",))[1]  # its prefetch is done
    larger = Member(third.run, third.config, (Planned("prefetch", "run", "", mem_gb=96), third.plan[1]))
    assert arrays.alike([first, sft_only, larger]) == [[first], [sft_only], [larger]]
    bad_nodes.remember(second.run, "n9", "ECC")
    assert arrays.alike([first, second, third]) == [[first, second, third]]


def test_a_profile_may_leave_each_point_its_own_jobs(tmp_path: Path) -> None:
    cluster = config(tmp_path, profile=PROFILE + "job_arrays: false\n")
    pair = [Member(RunDir(tmp_path / name), cluster, (Planned("sft", "run", ""),)) for name in NAMES[:2]]
    assert [len(group) for group in arrays.alike(pair)] == [1, 1]


# Submitting


def test_there_is_one_array_for_each_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_slurm(monkeypatch, tmp_path, "")
    submitted = arrays.submit(tmp_path / "s", members(tmp_path), at_once=2)
    array = tmp_path / "s" / "arrays" / submitted[0].id
    prefetch, sft = called(calls, "sbatch")
    assert prefetch.startswith(f"sbatch {array}/prefetch/.submission_file_")
    assert sft.startswith(f"sbatch --dependency=aftercorr:101 {array}/sft/.submission_file_")
    assert "#SBATCH --array=0-2%2\n" in (array / "sft" / "102_submission.sh").read_text()
    for task, name in enumerate(NAMES):
        assert ids(tmp_path, name) == [f"101_{task}", f"102_{task}"]
        run = RunDir(tmp_path / "s" / name)
        assert os.readlink(array / str(task)) == str(run.root)
        assert load.read_config(run.root).seed == task + 1
        assert (run.root / "jobs" / f"{submitted[0].id}-sft").is_dir()  # where Slurm opens the logs
        state = recorded_state(run, "sft")
        assert state is not None and (state.state, state.submission) == ("pending", submitted[0].id)


def fake_scontrol(folder: Path, body: str = "") -> None:
    (folder / "bin" / "scontrol").write_text(f'#!/bin/bash\necho "scontrol $*" >> {folder}/calls\n{body}\n')
    (folder / "bin" / "scontrol").chmod(0o755)


def orders(calls: Path) -> list[str]:
    """What Slurm was told, without the scripts' paths."""
    return [" ".join(line.split()[:-1]) if "sbatch" in line else line for line in calls.read_text().splitlines()]


def test_each_training_is_held_until_it_has_been_told_which_server_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_slurm(monkeypatch, tmp_path, "")
    record = tmp_path / "s" / NAMES[1] / "submission.json"
    fake_scontrol(tmp_path, f"grep -q 103_1 {record} || echo 'not recorded' >> {calls}")
    plan = tuple(Planned(stage, "run", "") for stage in ("convert", "serve", "train"))
    apart = config(tmp_path, profile=PROFILE + "placement: separate\n")
    arrays.submit(tmp_path / "s", [Member(RunDir(tmp_path / "s" / name), apart, plan) for name in NAMES[:2]])
    assert orders(calls) == [
        *("sbatch", "sbatch --dependency=aftercorr:101", "sbatch --dependency=aftercorr:101 --hold"),
        "scontrol update JobId=103_0 Dependency=afterok:101_0,after:102_0",
        "scontrol update JobId=103_1 Dependency=afterok:101_1,after:102_1",
        "scontrol release 103",
    ]


def test_each_of_many_tasks_is_told_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm compares the tasks of small arrays only with those of their numbers."""
    calls = fake_slurm(monkeypatch, tmp_path, "")
    fake_scontrol(tmp_path)
    plan = tuple(Planned(stage, "run", "") for stage in ("prefetch", "sft"))
    many = [Member(RunDir(tmp_path / "s" / str(seed)), config(tmp_path), plan) for seed in range(11)]
    arrays.submit(tmp_path / "s", many)
    assert orders(calls) == [
        *("sbatch", "sbatch --dependency=aftercorr:101 --hold"),
        *(f"scontrol update JobId=102_{task} Dependency=afterok:101_{task}" for task in range(11)),
        "scontrol release 102",
    ]


@pytest.mark.parametrize(("silences", "through"), [(2, True), (9, False)])
def test_a_controller_that_is_silent_is_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silences: int, through: bool
) -> None:
    calls = fake_slurm(monkeypatch, tmp_path, "")
    silent = "echo 'slurm_update error: Unable to contact slurm controller (connect failure)'; exit 1"
    fake_scontrol(tmp_path, f"[ $(grep -c ^scontrol {calls}) -gt {silences} ] || {{ {silent}; }}")
    plan = tuple(Planned(stage, "run", "") for stage in ("serve", "train"))
    apart = config(tmp_path, profile=PROFILE + "placement: separate\n")
    pair = [Member(RunDir(tmp_path / "s" / name), apart, plan) for name in NAMES[:2]]
    if through:
        arrays.submit(tmp_path / "s", pair)
        assert called(calls, "scontrol")[2:4] == [
            "scontrol update JobId=102_0 Dependency=after:101_0",
            "scontrol update JobId=102_1 Dependency=after:101_1",
        ]
    else:
        with pytest.raises(UserError, match="Unable to contact slurm controller"):
            arrays.submit(tmp_path / "s", pair)
        assert len(called(calls, "scontrol")) == 3 and called(calls, "scancel") == ["scancel 101 102"]


def test_an_array_avoids_the_broken_nodes_of_all_its_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_slurm(monkeypatch, tmp_path, "")
    given = members(tmp_path)
    bad_nodes.remember(given[1].run, "n9", "ECC")
    bad_nodes.remember(given[2].run, "n4", "ECC")
    array = str(arrays.submit(tmp_path / "s", given)[0].array)
    assert "#SBATCH --exclude=n4,n9\n" in (Path(array) / "sft" / "102_submission.sh").read_text()


def test_an_edit_of_the_code_between_two_points_ends_the_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_slurm(monkeypatch, tmp_path, "")
    calls.touch()
    monkeypatch.setattr(arrays.snapshot, "take", lambda run: run.root / "code" / run.root.name)
    with pytest.raises(UserError, match=r"the project's code was changed while its points took copies of it; submit"):
        arrays.submit(tmp_path / "s", members(tmp_path))
    assert called(calls, "sbatch") == [] and submissions.read(RunDir(tmp_path / "s" / NAMES[0])) is None


def test_the_time_of_a_submission_is_when_its_first_job_is_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has no id long after that is taken for what was never submitted."""
    fake_slurm(monkeypatch, tmp_path, "")
    described = arrays.describe

    def long_ago(*arguments: object) -> Submission:
        return replace(described(*arguments), time=1.0)

    monkeypatch.setattr(arrays, "describe", long_ago)
    began = time.time()
    assert all(each.time >= began for each in arrays.submit(tmp_path / "s", members(tmp_path)))


def test_a_refusal_half_way_takes_every_array_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_slurm(monkeypatch, tmp_path, 'if [ $n = 2 ]; then echo "sbatch: error: no" >&2; exit 1; fi')
    with pytest.raises(UserError, match=r"^job sft: sbatch: error: no"):
        arrays.submit(tmp_path / "s", members(tmp_path))
    assert called(calls, "scancel") == ["scancel 101"]
    for name in NAMES:
        state = recorded_state(RunDir(tmp_path / "s" / name), "prefetch")
        assert state is not None and state.state == "cancelled"
        assert state.reason.startswith("not all jobs could be submitted: job sft")


def test_tasks_that_a_killed_submitter_could_not_record_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_slurm(monkeypatch, tmp_path, "")
    submitted = arrays.submit(tmp_path / "s", members(tmp_path))[1]
    lost = submitted.with_job(Job(("sft",), ("prefetch",)))
    scripts = [(f"102_{task}", f"{submitted.array}/sft/.submission_file_0a.sh") for task in range(3)]
    scripts += [("90_1", f"{submitted.array}/sft/90_submission.sh"), ("103_1", f"{submitted.array}/prefetch/x.sh")]
    monkeypatch.setattr(queue, "own_scripts", lambda: scripts)
    assert submissions.with_orphans(lost) == submitted  # 102_1: the latest of its own
