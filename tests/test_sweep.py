"""A sweep is one run for each point; what no point changes runs once, and the table says how each ended."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers_jobs import command, fake_slurm, submit
from test_plan import finish

from pipeline.config import load
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run import atomic
from pipeline.run.directory import Outputs, RunDir
from pipeline.run.hashing import HashCache
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.state import set_state
from pipeline.stages.base import Context
from pipeline.stages.plan import make_plan
from pipeline.submit import main
from pipeline.sweep import share
from pipeline.sweep.__main__ import main as show
from pipeline.sweep.points import Point, make_points, parse_sweep, preset_of, read_points, remember
from pipeline.sweep.results import as_table, read_result, reward_key
from pipeline.sweep.submit import resolve_points, submit_points

BEFORE = ("prefetch", "sft", "reward-model", "sandbox", "convert")


def demo(*overrides: str) -> Config:
    return load.resolve({**load.load_preset("demo"), "preset": "demo"}, overrides)


def context(root: Path, config: Config) -> Context:
    return Context(RunDir(root), config, HashCache(root / "hashes.json"))


# Points


def test_values_are_yaml_divided_by_commas() -> None:
    assert parse_sweep("ppo.init_kl_coef=0.02,0.05,0.1") == ("ppo.init_kl_coef", ["0.02", "0.05", "0.1"])
    assert parse_sweep("optimizer.betas=[0.9,0.95],[0.9,0.99]")[1] == ["[0.9, 0.95]", "[0.9, 0.99]"]
    assert parse_sweep("ppo.target=null,6")[1] == ["null", "6"]
    assert parse_sweep("optimizer.lr=1e-5")[1] == ["1e-5"]
    assert parse_sweep("data.source='a,b',c")[1] == ['"a,b"', "c"]


def test_points_are_the_product_under_names_that_a_path_can_have() -> None:
    points = make_points(["ppo.lam=0.9,1", "generate.stop_sequences=[],['Human:']"])
    assert [point.overrides for point in points[:2]] == [
        ["ppo.lam=0.9", "generate.stop_sequences=[]"],
        ["ppo.lam=0.9", 'generate.stop_sequences=["Human:"]'],
    ]
    names = [point.name for point in points]
    assert len(set(names)) == 4
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzH0123456789._=-") for name in names)
    assert make_points(["ppo.init_kl_coef=0.05"])[0].name == "ppo.init_kl_coef=0.05"
    many = make_points([f"data.source={'x' * 300},{'x' * 301}"])
    assert len({point.name for point in many}) == 2 and max(len(point.name) for point in many) < 160


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (["ppo.lam"], "--sweep ppo.lam: expected key=values"),
        (["ppo..lam=1"], "--sweep ppo..lam=1: expected key=values"),
        (["ppo.lam="], "--sweep ppo.lam=: there is no value"),
        (["ppo.lam=[1"], "--sweep ppo.lam=[1: the values are not valid YAML"),
        (["ppo.lam=1,1"], "--sweep ppo.lam=1,1: 1 is given twice"),
        (["ppo.lam=1", "ppo.lam=0"], "--sweep ppo.lam: is given twice; give all its values in one option"),
        (["data.revision=2024-01-01"], "--sweep data.revision=2024-01-01: 2024-01-01 is a date; quote"),
    ],
)
def test_a_sweep_that_is_none_is_one_line(sweeps: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_points(sweeps)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_every_point_is_checked_before_anything_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--preset", "demo", "--run-dir", str(tmp_path / "s"), "--sweep", "ppo.lam=0.9,high,2,1"]
    with pytest.raises(UserError, match=r"^ppo.lam: input should be less than .* \(point ppo.lam=2\)$"):
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ppo.lam: input should be a valid number") and line.endswith("(point ppo.lam=high)")
    with pytest.raises(UserError, match=r"ppo.lamm: unknown key \(did you mean 'lam'\?\)"):
        main([*arguments[:-1], "ppo.lamm=1,2"])
    assert capsys.readouterr().err == ""  # one fault of all points is one line
    assert not (tmp_path / "s").exists()


def test_a_dry_run_shows_the_points_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "s"
    assert main(["--preset", "demo", "--run-dir", str(folder), "--sweep", "sft.lr=1e-3,2e-3", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"sweep in {folder}: 2 points (cluster local)",
        "  shared: prefetch, sandbox, once for all points",
        "  sft.lr=1e-3: sft, reward-model, convert, serve, train, evaluate",
        "  sft.lr=2e-3: sft, reward-model, convert, serve, train, evaluate",
    ]
    assert not folder.exists()


def test_later_commands_add_points(tmp_path: Path) -> None:
    remember(tmp_path, make_points(["ppo.lam=0.9,1"]))
    remember(tmp_path, make_points(["ppo.lam=1,0.5"]))
    assert [point.name for point in read_points(tmp_path)] == ["ppo.lam=0.9", "ppo.lam=1", "ppo.lam=0.5"]


# What is shared


@pytest.mark.parametrize(
    ("sweep", "shared"),
    [
        ("ppo.init_kl_coef=0.02,0.05", BEFORE),
        ("reward_model.lr=1e-3,2e-3", ("prefetch", "sft", "sandbox")),
        ("serving.dtype=float32,bfloat16", ("prefetch", "sft", "reward-model", "sandbox")),
        ("seed=1,2", ("sandbox",)),
        ("data.limit_train=50,60", ("sandbox",)),
    ],
)
def test_stages_that_no_swept_key_changes_are_shared(tmp_path: Path, sweep: str, shared: tuple[str, ...]) -> None:
    configs = [demo(*point.overrides) for point in make_points([sweep])]
    assert share.shared_stages(RunDir(tmp_path), configs, demo().all) == shared


def test_a_point_takes_what_was_made_and_has_not_to_make_it(tmp_path: Path) -> None:
    shared, point = tmp_path / "shared", tmp_path / "point"
    made = demo("ppo.lam=0.9", "reward_model.lr=0.5")
    finish(context(shared, made), *BEFORE)
    config = demo("ppo.lam=1.0")
    assert share.take(RunDir(shared), RunDir(point), config) == ["prefetch", "sft", "sandbox"]  # another reward model
    actions = {each.stage: each.action for each in make_plan(context(point, config), config.all, (), {})}
    assert actions == {
        **{"prefetch": "skip", "sft": "skip", "sandbox": "skip", "reward-model": "run"},
        **{"convert": "run", "serve": "run", "train": "run", "evaluate": "run"},
    }
    model = RunDir(point).artifact("sft", "model")
    assert model.is_relative_to(point) and model.samefile(RunDir(shared).artifact("sft", "model"))  # a hard link
    assert (point / "models" / "sft").samefile(model)

    assert share.take(RunDir(shared), RunDir(point), config) == []  # it has them
    finish(context(shared, made), "prefetch", "sft", content="made anew")
    assert share.take(RunDir(shared), RunDir(point), config) == ["prefetch", "sft"]
    assert RunDir(point).artifact("sft", "model").read_text() == "made anew"


@pytest.mark.chain
def test_a_sweep_runs_and_its_shared_stage_ran_once(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    done = submit(folder, "--stage", "prefetch", "--sweep", "ppo.init_kl_coef=0.02,0.05")
    assert done.status == 0, done.err
    points = ["ppo.init_kl_coef=0.02", "ppo.init_kl_coef=0.05"]
    assert [load.read_config(folder / name).ppo.init_kl_coef for name in points] == [0.02, 0.05]
    rows = {(folder / name / "data" / "train.jsonl").stat().st_ino for name in ("shared", *points)}
    assert len(rows) == 1  # the same file
    assert done.out.count("prefetch     run ") == 1
    assert "shared: 96 training and 24 test dialogues" in command("status", folder / points[1]).out
    assert "prefetch done" in done.out and json.loads((folder / "sweep.json").read_text())[1]["name"] == points[1]


SBATCH = (
    'n=$(ls {0}/jobs 2>/dev/null | wc -l); mkdir -p {0}/jobs; : > {0}/jobs/$n; echo "Submitted batch job $((100 + n))"'
)


def test_on_slurm_the_shared_jobs_come_first_and_then_all_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake_slurm(monkeypatch, tmp_path, sbatch=SBATCH.format(tmp_path), squeue="", scancel="")
    profile = tmp_path / "site.yaml"
    profile.write_text("name: site\nexecutor: slurm\n")
    folder = tmp_path / "s"
    arguments = ["--preset", "demo", "--run-dir", str(folder), "--cluster", str(profile), "--no-follow"]
    arguments += ["--sweep", "ppo.lam=0.9,1.0"]

    assert main(arguments) == 0
    assert "no point has been submitted: the same command does that" in capsys.readouterr().err
    jobs = [line.split("/")[-2].partition("-")[2][16:] for line in calls.read_text().splitlines() if "sbatch" in line]
    assert len(jobs) == 5 and not (folder / "ppo.lam=0.9").exists()

    config = load.read_config(folder / "shared")
    monkeypatch.setattr("pipeline.scheduler.submission._asked", {})
    finish(context(folder / "shared", config), *BEFORE)
    assert main(arguments) == 0
    out = capsys.readouterr().out
    first, then = [line for line in calls.read_text().splitlines() if "sbatch" in line][5:]
    assert "/arrays/" in first and "/serve+train/" in first and "--dependency" not in first
    assert "--dependency=aftercorr:105" in then and "/evaluate/" in then
    assert "submitted as job arrays of 2 points: serve+train (105), evaluate (106)" in out
    records = [submissions.read(RunDir(folder / name)) for name in ("ppo.lam=0.9", "ppo.lam=1.0")]
    assert [[job.job_id for job in each.jobs] for each in records if each] == [["105_0", "106_0"], ["105_1", "106_1"]]
    assert "shared: prefetch, sft, reward-model, sandbox, convert" in out


# The table


def point_with(folder: Path, name: str, rows: list[dict[str, Any]], judged: dict[str, Any] | None) -> Point:
    run = RunDir(folder / name)
    atomic.write_text(run.config, load.dump(demo()))
    atomic.write_text(run.metrics, "".join(json.dumps(row) + "\n" for row in rows))
    for stage in ("prefetch", "sft", "reward-model", "sandbox", "convert", "train"):
        run.write_outputs(Outputs(stage, "f", 1, {}, {"loss": 2.5} if stage == "sft" else {}))
    if judged is not None:
        run.write_outputs(Outputs("evaluate", "f", 1, {}, judged))
    key, _, value = name.partition("=")
    return Point(name, {key: value})


def test_the_table_shows_each_points_figures_and_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"step": 0, "reward/mean": 0.5}, {"step": 8, "reward/mean": 2.0, "policy/sqrt_kl": 3.0}]
    rows += [{"step": 16, "reward/mean": 1.25, "policy/sqrt_kl": 2.0}]
    judged = {"paired": {"mean": 0.75, "low": 0.5, "high": 1.0, "n": 9}, "kl": 3.5, "win_rate": 0.8}
    points = [point_with(tmp_path, "ppo.lam=0.9", rows, judged), point_with(tmp_path, "ppo.lam=1", rows[:2], None)]
    points += [Point("ppo.lam=0.5", {"ppo.lam": "0.5"})]
    set_state(RunDir(tmp_path / "ppo.lam=1"), "evaluate", "s", "failed", "no memory")
    remember(tmp_path, points)

    assert show([os.path.relpath(tmp_path)]) == 0
    heading, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert " ".join(heading).startswith("ppo.lam state steps held-out loss held-out reward best KL difference 95 %")
    assert [" ".join(line) for line in lines] == [
        "0.9 done 16 2.500 1.250 2.000 3.50 +0.750 +0.500 to +1.000 80%",
        "1 failed: evaluate 8 2.500 2.000 2.000 9.00 – – –",
        "0.5 not started – – – – – – – –",
    ]

    first, second, third = json.loads((tmp_path / "sweep.json").read_text())
    assert (first["reward_final"], first["reward_best"], first["low"]) == (1.25, 2.0, 0.5)
    assert (second["difference"], second["kl"]) == (None, 9.0)  # the square of the root that was logged
    table = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [row["ppo.lam"] for row in table] == ["0.9", "1", "0.5"]
    assert (table[0]["difference"], table[1]["difference"], third["state"]) == ("0.75", "", "not started")


def test_figures_of_a_stage_that_runs_again_are_not_shown(tmp_path: Path) -> None:
    point = point_with(tmp_path, "ppo.lam=1", [{"step": 4, "reward/mean": 1.0}], {"kl": 1.0, "win_rate": 0.5})
    assert read_result(tmp_path, point).win_rate == 0.5
    set_state(RunDir(tmp_path / point.name), "evaluate", "s", "failed", "")
    assert (read_result(tmp_path, point).win_rate, read_result(tmp_path, point).kl) == (None, None)


def test_of_ilqls_betas_the_results_own_counts() -> None:
    rows = [{"step": 0, "reward/mean@beta=1": 0.0, "reward/mean@beta=4": 1.0, "reward/mean@beta=14": 2.0}]
    config = demo("train.method=ilql", "ilql.betas=[1,4,14]", "ilql.best_beta=4")
    assert reward_key(rows, config) == "reward/mean@beta=4"
    assert reward_key(rows, demo("train.method=ilql", "ilql.betas=[4,1]")) == "reward/mean@beta=1"
    assert reward_key([{"step": 0, "reward/mean": 0.0}], demo()) == "reward/mean"


def test_a_folder_that_is_no_sweep_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a sweep \(no points.json\); give the folder"):
        show([str(tmp_path)])
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="is a run by itself; a sweep takes a folder of its own"):
        main(["--preset", "demo", "--run-dir", str(tmp_path), "--sweep", "seed=1,2"])


def test_a_narrow_terminal_folds_long_values() -> None:
    from pipeline.sweep.results import Result

    lines = as_table([Result("p", {"data.source": "x" * 90}, "done", steps=3)], 60, False).splitlines()
    assert max(map(len, lines)) <= 60 and "".join(line.split()[0] for line in lines[1:]).count("x") == 90


# Submitting


def test_a_point_that_cannot_run_keeps_no_other_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = []

    def one(folder: Path, config: Config, selected: Sequence[str], forced: Sequence[str], no_follow: bool) -> int:
        ran.append((folder.name, tuple(selected)))
        if folder.name == "train.total_steps=100":
            raise UserError("ppo.num_rollouts: too many for this machine")
        for stage in selected:
            RunDir(folder).write_outputs(Outputs(stage, "f", 1))
        return 0

    places = resolve_points(
        tmp_path, make_points(["train.total_steps=100,200"]), lambda run, given: demo("all=[train]", *given),
        lambda config: config.all,
    )  # fmt: skip
    status = submit_points(tmp_path, places, False, False, one, lambda folder: 0)
    assert (status, ran) == (2, [("train.total_steps=100", ("train",)), ("train.total_steps=200", ("train",))])
    said = capsys.readouterr()
    assert said.err == "error: ppo.num_rollouts: too many for this machine (point train.total_steps=100)\n"
    assert "again: python -m pipeline.sweep" in said.out


def test_a_point_that_is_added_begins_as_the_others_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (first, later) = make_points(["ppo.lam=0.9,1"])
    remember(tmp_path, [first])
    atomic.write_text(tmp_path / first.name / "config.yaml", load.dump(demo("ppo.lam=0.9")))
    monkeypatch.setenv("CONFIG_NAME", "20B")
    assert main(["--run-dir", str(tmp_path), "--sweep", "ppo.lam=1", "--dry-run"]) == 0
    assert f"  {later.name}: serve, train, evaluate" in capsys.readouterr().out  # and not 20B's stages
    assert preset_of(tmp_path) == "demo" and preset_of(tmp_path / "none") is None
    (tmp_path / first.name / "config.yaml").rename(tmp_path / "config.yaml.shared")
    atomic.write_text(tmp_path / "shared/config.yaml", (tmp_path / "config.yaml.shared").read_text())
    assert preset_of(tmp_path) == "demo"  # as before the shared stages are done
