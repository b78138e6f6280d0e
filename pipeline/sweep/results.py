"""What the points of a sweep came to, read from their run directories; as a table, sweep.json and sweep.csv."""

from __future__ import annotations

import csv
import io
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.config.load import read_config
from pipeline.config.schema import Config
from pipeline.run import atomic
from pipeline.run.directory import RunDir
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.view import StageView, view_run
from pipeline.sweep.points import Point, read_points
from pipeline.training.metrics import Row, read_rows

MISSING = "–"
REWARD = "reward/mean"
COLUMNS = {
    "state": "state",
    "steps": "steps",
    "loss": "held-out loss",
    "accuracy": "RM accuracy",
    "reward_final": "held-out reward",
    "reward_best": "best",
    "kl": "KL",
    "difference": "difference",
    "interval": "95 % interval",
    "win_rate": "wins",
}
"""What a result shows, and its heading."""


@dataclass(frozen=True)
class Result:
    """One point's figures; None where there is none (yet)."""

    name: str
    values: dict[str, str]
    state: str
    steps: int | None = None
    """Optimiser steps of the training."""
    loss: float | None = None
    """Of the SFT model, nats per held-out token."""
    accuracy: float | None = None
    """Of the reward model, on held-out pairs."""
    reward_final: float | None = None
    """Mean held-out reward at the training's last evaluation."""
    reward_best: float | None = None
    """The highest of its evaluations."""
    kl: float | None = None
    """KL(policy || start), nats per response: the evaluation's, before it the last phase's."""
    difference: float | None = None
    """Mean difference in reward from the start, paired by prompt, with its 95 % interval."""
    low: float | None = None
    high: float | None = None
    win_rate: float | None = None


def write_table(folder: Path) -> str:
    """Read all points, write sweep.json and sweep.csv, and return the table."""
    results = [read_result(folder, point) for point in read_points(folder)]
    atomic.write_json(folder / "sweep.json", [asdict(result) for result in results])
    atomic.write_text(folder / "sweep.csv", as_csv(results))
    on_terminal = sys.stdout.isatty()
    return as_table(results, shutil.get_terminal_size().columns if on_terminal else _PAPER, on_terminal)


def read_result(folder: Path, point: Point) -> Result:
    """The point's state and figures; those of stages that are to run again are left out."""
    run = RunDir((folder / point.name).absolute())
    if not run.config.is_file():
        return Result(point.name, point.values, "not started")
    config = read_config(run.root)
    views = view_run(run, submissions.read(run))
    open_stages = {view.stage for view in views if view.state not in ("done", "skipped")}
    recorded = {name: {} if name in open_stages else run.values(name) for name in ("sft", "reward-model", "evaluate")}
    rows = _training_rows(run, views) if "train" in config.all else []
    rewards = curve(rows, reward_key(rows, config))
    judged = recorded["evaluate"]
    paired = judged.get("paired", {})
    roots = curve(rows, "policy/sqrt_kl")
    return Result(
        point.name,
        point.values,
        state_of(run, config, views),
        steps=int(rows[-1]["step"]) if rows else None,
        loss=recorded["sft"].get("loss"),
        accuracy=recorded["reward-model"].get("accuracy"),
        reward_final=rewards[-1] if rewards else None,
        reward_best=max(rewards, default=None),
        kl=judged.get("kl", roots[-1] ** 2 if roots else None),
        difference=paired.get("mean"),
        low=paired.get("low"),
        high=paired.get("high"),
        win_rate=judged.get("win_rate"),
    )


def _training_rows(run: RunDir, views: Sequence[StageView]) -> list[Row]:
    """The metrics of the training: of the finished one, of one under way, or none while one waits to begin anew."""
    state = next((view.state for view in views if view.stage == "train"), "done")
    if state in ("pending", "waiting"):
        return []
    ended = state in ("done", "skipped")
    return read_rows(run.root / (run.values("train") if ended else {}).get("metrics", run.metrics.name))


def curve(rows: Sequence[Row], key: str) -> list[float]:
    """A metric's finite values, in order."""
    return [float(row[key]) for row in rows if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])]


def reward_key(rows: Sequence[Row], config: Config) -> str:
    """The held-out reward's metric; ILQL has one for each beta, of which that of the result counts."""
    keys = {key for row in rows for key in row if key.startswith(f"{REWARD}@")}
    chosen = config.ilql.best_beta if config.ilql.best_beta is not None else config.ilql.betas[-1]
    named = [key for key in sorted(keys) if key.endswith(tuple(f"={text}" for text in (f"{chosen:g}", str(chosen))))]
    return named[0] if named else REWARD


def state_of(run: RunDir, config: Config, views: Sequence[StageView]) -> str:
    """A run's state in a word or two: "done", or the stage that is in its way, or the last one that was asked for."""
    for state in ("failed", "running", "stopped", "cancelled", "waiting", "pending"):
        stages = [view.stage for view in views if view.state == state and view.stage != "serve"]
        if stages:
            return f"{state}: {stages[0]}"
    skipped = {"serve", *(("reward-model",) if config.reward_model.checkpoint is not None else ())}
    wanted = [stage for stage in config.all if stage not in skipped]
    done = [stage for stage in wanted if run.outputs(stage) is not None]
    if done == wanted:
        return "done"
    return f"{done[-1]} done" if done else "not started"


def as_csv(results: Sequence[Result]) -> str:
    """One line a point; empty where there is no figure."""
    keys = swept_keys(results)
    names = [field.name for field in fields(Result) if field.name not in ("name", "values")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["point", *keys, *names])
    for result in results:
        row = [getattr(result, name) for name in names]
        writer.writerow([result.name, *(result.values.get(key, "") for key in keys), *row])
    return text.getvalue()


def as_table(results: Sequence[Result], width: int, colour: bool) -> str:
    """The results as a table for a terminal; columns without any figure are left out, single gaps are dashes."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    keys = swept_keys(results)
    cells = [{name: _cell(result, name) for name in COLUMNS} for result in results]
    shown = [name for name in COLUMNS if any(row[name] != MISSING for row in cells)]
    best = max((result.difference for result in results if result.difference is not None), default=None)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for key in keys:
        table.add_column(key, overflow="fold")
    for name in shown:
        table.add_column(COLUMNS[name], justify="left" if name == "state" else "right", no_wrap=name != "state")
    for result, row in zip(results, cells, strict=True):
        style = "green" if best is not None and result.difference == best else ""
        texts = [*(result.values.get(key, MISSING) for key in keys), *(row[name] for name in shown)]
        table.add_row(*(Text(text, style=style) for text in texts))
    console = Console(width=width, force_terminal=colour, no_color=not colour, file=io.StringIO(), highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def swept_keys(results: Sequence[Result]) -> list[str]:
    """The keys of all points, in their order."""
    return list(dict.fromkeys(key for result in results for key in result.values))


_PAPER = 160
"""Columns where there is no terminal."""
_FORMS: Mapping[str, str] = {"steps": "d", "kl": ".2f", "difference": "+.3f", "win_rate": ".0%"}


def _cell(result: Result, name: str) -> str:
    if name == "interval":
        known = result.low is not None and result.high is not None
        return f"{result.low:+.3f} to {result.high:+.3f}" if known else MISSING
    value: Any = getattr(result, name)
    if value is None:
        return MISSING
    return value if isinstance(value, str) else format(value, _FORMS.get(name, ".3f"))
