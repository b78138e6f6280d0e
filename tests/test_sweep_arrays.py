"""A sweep on Slurm: which points are tasks of job arrays, and what becomes of the others; sbatch is a stand-in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from test_plan import finish
from test_slurm_arrays import NAMES, config, ids
from test_slurm_submission import LIMIT, PROFILE, called, fake_slurm

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.run.hashing import HashCache
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.submission import Job, Submission
from pipeline.scheduler.submit import save_config
from pipeline.stages.base import Context
from pipeline.submit import main
from pipeline.sweep import arrays
from pipeline.sweep.place import Place
from pipeline.sweep.points import STOP, make_points, remember
from pipeline.sweep.submit import resolve_points, submit_points


def sweep(folder: Path, *arguments: str) -> list[str]:
    (folder / "site.yaml").write_text(PROFILE)
    given = ["--preset", "demo", "--run-dir", str(folder / "s"), "--cluster", str(folder / "site.yaml"), "--no-follow"]
    return [*given, "--stage", "prefetch,sft", "--sweep", "seed=1,2,3", *arguments]


NONE_HERE = "echo 'sbatch: error: Batch job submission failed: Invalid job array specification' >&2; exit 1"


def test_where_sbatch_takes_no_arrays_each_point_is_a_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake_slurm(monkeypatch, tmp_path, f'case "$*" in */arrays/*) {NONE_HERE};; esac')
    assert main(sweep(tmp_path)) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "Invalid job array specification (cluster profile site); each point is a chain of its own" in line
    assert [ids(tmp_path, name) for name in NAMES] == [["102", "103"], ["104", "105"], ["106", "107"]]
    assert "--dependency=afterok:102 " in called(calls, "sbatch")[2]


FULL = f"echo '{LIMIT.replace(chr(39), '')}' >&2; exit 1"


@pytest.mark.parametrize("refusal", [NONE_HERE, FULL])
def test_where_sbatch_takes_no_arrays_points_cannot_be_held_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refusal: str
) -> None:
    calls = fake_slurm(monkeypatch, tmp_path, refusal)
    assert main(sweep(tmp_path, "--at-once", "2")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Batch job submission failed: " in line
    ways = "leave --at-once out, and each point is a chain of its own, or give fewer points"
    assert line.endswith(f"{ways} (points {', '.join(NAMES)})")
    assert len(called(calls, "sbatch")) == (1 if refusal == NONE_HERE else 3)


def test_where_the_queue_has_no_room_for_arrays_chains_go_as_far_as_they_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Room for three jobs: three calls for the array, four for two chains with the last one's job refused thrice."""
    calls = fake_slurm(monkeypatch, tmp_path, f"if [ $n -le 3 ] || [ $n -ge 7 ]; then {FULL}; fi")
    assert main(sweep(tmp_path)) == 2
    array, chain, left = capsys.readouterr().err.splitlines()
    assert "job submit limit" in array and "; each point is a chain of its own (" in array
    assert chain.startswith("error: job sft: ") and chain.endswith(f"(point {NAMES[1]})")
    assert left == f"not submitted: {NAMES[2]}; the same command does that once there is room in the queue"
    assert ids(tmp_path, NAMES[0]) == ["104", "105"] and called(calls, "scancel") == ["scancel 106"]
    assert len(called(calls, "sbatch")) == 3 + 2 + 4


def test_the_same_command_submits_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake_slurm(monkeypatch, tmp_path, "")
    done, half = RunDir(tmp_path / "s" / NAMES[0]), RunDir(tmp_path / "s" / NAMES[1])
    for run, stages in ((done, ("prefetch", "sft")), (half, ("prefetch",))):
        finish(Context(run, config(tmp_path, run.root.name), HashCache(run.root / "hashes.json")), *stages)
    assert main([*sweep(tmp_path, "--at-once", "1"), "--sweep", "sft.lr=1e-3"]) == 0
    capsys.readouterr()
    assert len(called(calls, "sbatch")) == 2  # other names: three new points, all alike
    assert main(sweep(tmp_path, "--at-once", "1")) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out
    assert [f"point {name}: its jobs are like no other's; --at-once does not count it" in out for name in NAMES] == [
        *(False, True, True),
    ]
    assert (ids(tmp_path, NAMES[1]), ids(tmp_path, NAMES[2])) == (["103"], ["104", "105"])


class Here:
    """Stands in for what submits one run: its stages end at once, all with the status that is given for the run."""

    def __init__(self, folder: Path, statuses: dict[str, int] | None = None) -> None:
        self.folder, self.statuses = folder, statuses or {}
        self.ran: list[tuple[str, list[str], list[str]]] = []

    def __call__(
        self, run_dir: Path, config: Config, selected: Sequence[str], forced: Sequence[str], no_follow: bool
    ) -> int:
        assert list(self.folder.glob("s/*/control/submit.lock")) == []  # it may take hours
        self.ran.append((run_dir.name, list(selected), list(forced)))
        finish(Context(RunDir(run_dir), config, HashCache(run_dir / "hashes.json")), *selected)
        return self.statuses.get(run_dir.name, 0)

    def places(self, more: str = "") -> list[Place]:
        """Three points whose first stage runs on the login node."""
        return resolve_points(
            self.folder / "s",
            make_points(["seed=1,2,3"]),
            lambda run, given: config(self.folder, *given, profile=PROFILE + "on_login_node: [prefetch]\n" + more),
            lambda config: ("prefetch", "sft"),
        )


@pytest.mark.parametrize(("last", "submitted"), [(1, 1), (130, 0)])
def test_what_runs_on_the_login_node_is_done_before_the_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int, submitted: int
) -> None:
    calls = fake_slurm(monkeypatch, tmp_path, "")
    calls.touch()
    here = Here(tmp_path, {NAMES[2]: last})  # its prefetch fails, or Ctrl-C ends it all
    assert submit_points(tmp_path / "s", here.places(), False, True, here, lambda folder: 0) == last
    assert here.ran == [(name, ["prefetch"], []) for name in NAMES]
    assert len(called(calls, "sbatch")) == submitted
    if submitted:
        assert [ids(tmp_path, name) for name in NAMES[:2]] == [["101_0"], ["101_1"]]


@pytest.mark.parametrize("more", ["", "job_arrays: false\n"])
def test_what_was_forced_on_the_login_node_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str
) -> None:
    """Neither where arrays are refused, nor by a point whose jobs are like no other's."""
    fake_slurm(monkeypatch, tmp_path, NONE_HERE)
    here = Here(tmp_path)
    assert submit_points(tmp_path / "s", here.places(more), True, True, here, lambda folder: 0) == 0
    first = [(name, ["prefetch"], ["prefetch"]) for name in NAMES]
    assert here.ran == first + [(name, ["sft"], ["sft"]) for name in NAMES]


def test_after_a_cancellation_nothing_else_is_submitted_until_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake_slurm(monkeypatch, tmp_path, "")
    calls.touch()
    here, stop = Here(tmp_path), tmp_path / "s" / STOP

    def cancelled(*arguments: object) -> int:
        stop.parent.mkdir(parents=True, exist_ok=True)
        stop.touch()
        return here(*arguments)  # type: ignore[arg-type]

    assert submit_points(tmp_path / "s", here.places(), False, True, cancelled, lambda folder: 0) == 130
    assert len(here.ran) == 1 and called(calls, "sbatch") == []
    said = "pipeline.cancel has ended the sweep: nothing else is submitted; the same command goes on\n"
    assert capsys.readouterr().err == said
    assert submit_points(tmp_path / "s", here.places(), False, True, here, lambda folder: 0) == 0
    assert len(called(calls, "sbatch")) == 1 and not stop.exists()


# What is said


def test_a_dry_run_says_that_there_will_be_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(sweep(tmp_path, "--at-once", "2", "--dry-run")) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  job arrays of 3 points, at most 2 at once: prefetch, sft"
    assert main(sweep(tmp_path, "--stage", "sandbox", "--dry-run")) == 0
    assert "job arrays" not in capsys.readouterr().out  # all of it is shared
    assert not (tmp_path / "s").exists()


def finished(folder: Path, *points: tuple[str, tuple[str, ...]]) -> None:
    """These stages of points have been done by an earlier command."""
    for name, stages in points:
        run, known = RunDir(folder / "s" / name), config(folder, name)
        save_config(run, known)
        finish(Context(run, known, HashCache(run.root / "hashes.json")), *stages)


def test_a_dry_run_shows_the_arrays_of_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tmp_path, (NAMES[0], ("prefetch", "sft")), (NAMES[1], ("prefetch",)), (NAMES[2], ("prefetch",)))
    assert main(sweep(tmp_path, "--dry-run")) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  job arrays of 2 points: sft"
    assert main(sweep(tmp_path, "--dry-run", "--force")) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  job arrays of 3 points: prefetch, sft"
    for name, value in {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"}.items():  # where none would be submitted
        monkeypatch.setenv(name, value)
    assert main(sweep(tmp_path, "--dry-run", "--force", "--set", "cluster.on_login_node=[prefetch]")) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  job arrays of 3 points: sft"


def test_what_else_of_the_sweep_may_run_than_at_once_counts_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_slurm(monkeypatch, tmp_path, "")
    assert main(sweep(tmp_path, "--at-once", "1")) == 0
    assert "by itself" not in capsys.readouterr().out  # nothing else

    (tmp_path / "bin" / "squeue").write_text("#!/bin/bash\necho 7\n")
    (queued,) = make_points(["seed=9"])
    remember(tmp_path / "s", [queued])
    submissions.write(RunDir(tmp_path / "s" / queued.name), Submission("s", "slurm", (Job(("sft",), job_id="7"),)))
    finished(tmp_path, *((f"seed={seed}", ("prefetch",)) for seed in (4, 5)))
    assert main([*sweep(tmp_path, "--at-once", "1")[:-4], "--sweep", "seed=4,5,6,7", "--at-once", "1"]) == 0
    said = "counts in each group of alike points by itself: 2 are submitted now, and 1 points are in the queue already"
    assert f"--at-once 1 {said}\n" in capsys.readouterr().out


def test_each_points_own_profile_says_whether_it_can_be_held_back(tmp_path: Path) -> None:
    points = make_points(["cluster.job_arrays=true,false"])
    places = [Place(point, tmp_path / point.name, config(tmp_path, *point.overrides), ("sft",)) for point in points]
    with pytest.raises(UserError, match=r"which cluster.job_arrays: false switches off"):
        arrays.check_at_once(places, 2)


@pytest.mark.parametrize(
    ("profile", "arguments", "message"),
    [
        (PROFILE, ["--at-once", "0", "--sweep", "seed=1,2"], r"^--at-once 0: no point would run; give 1 or more"),
        (PROFILE, ["--at-once", "2"], r"^--at-once 2: it is for the points of a --sweep; leave it out"),
        (
            "executor: local\n",
            ["--at-once", "2", "--sweep", "seed=1,2"],
            r"^--at-once 2: with cluster.executor: local points take turns",
        ),
        (
            PROFILE + "job_arrays: false\n",
            ["--at-once", "2", "--sweep", "seed=1,2"],
            r"^--at-once 2: .* which cluster.job_arrays: false switches off",
        ),
    ],
)
def test_points_that_cannot_be_held_back_are_refused_in_one_line(
    tmp_path: Path, profile: str, arguments: list[str], message: str
) -> None:
    (tmp_path / "site.yaml").write_text(profile)
    given = ["--preset", "demo", "--run-dir", str(tmp_path / "s"), "--cluster", str(tmp_path / "site.yaml")]
    with pytest.raises(UserError, match=message):
        main([*given, *arguments])
    assert not (tmp_path / "s").exists()
