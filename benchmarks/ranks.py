"""What a second process brings: `python benchmarks/ranks.py [--data FOLDER]`.

The real training under `accelerate launch`, on the CPU over gloo: one process of one thread, and several of one thread
each, with the same work a process (rollouts, batch). The sides take turns; every launch is a training of its own in a
new run, whose first phase does not count. Rewards are computed in the training processes. Give it as many idle cores
as there are processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from typing import Any

from _common import (
    add_data_options,
    add_options,
    make_run,
    parser_of,
    quiet,
    read_data,
    save_models,
    settings_of,
    workplace,
)
from _figures import alternate, machine, print_figures, print_table

from pipeline.config.schema import Config
from pipeline.errors import run_command
from pipeline.run.directory import RunDir
from pipeline.stages.base import Work
from pipeline.stages.launch import accelerate_config, launch_command

Rows = list[dict[str, Any]]
"""What a training recorded, a row a phase."""


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    options = parse(argv)
    show(measure(options), options)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    add_data_options(parser)
    parser.add_argument("--processes", type=int, default=2, help="processes of the second side (default: 2)")
    add_options(parser, shape="peers", rounds=(3, "launches of each side"))
    parser.add_argument("--phases", type=int, default=3, help="phases of a launch, the first not counted (default: 3)")
    add_options(parser, rollouts=(32, "prompts of a process and phase"), new_tokens=128, seq_length=512)
    add_options(parser, batch_size=(8, "rollouts of a process and step"))
    return parser.parse_args(argv)


def measure(options: argparse.Namespace) -> dict[int, list[Rows]]:
    """What each side's trainings recorded, by the number of processes."""
    quiet()
    preferences, tokenizer = read_data(options.data, options.vocabulary, options.seq_length)
    steps = options.phases * 4 * options.rollouts // options.batch_size
    more = {"train": {"total_steps": steps}, "ppo": {"ppo_epochs": 4}}
    settings = settings_of(options.seq_length, options.new_tokens, options.rollouts, options.batch_size, more)
    with workplace() as root:
        save_models(root, options.shape, "demo", tokenizer, len(tokenizer), options.seq_length)
        print(f"{machine()}; shape {options.shape}; {options.rollouts} rollouts a process and phase, "
              f"{options.new_tokens} new tokens, batches of {options.batch_size} a process; {options.rounds} launches "
              f"of {options.phases} phases")  # fmt: skip
        launched = 0

        def launch(processes: int) -> Rows:
            nonlocal launched
            launched += 1
            return train(*make_run(root / f"run-{launched}", root, preferences, settings), processes)

        sides = {count: (lambda count=count: launch(count)) for count in (1, options.processes)}
        return alternate(sides, options.rounds, warm_up=0)


def train(run: RunDir, config: Config, processes: int) -> Rows:
    """Launch the training as its stage does, with one thread a process; the rows of its phases but the first."""
    work = Work(run, config, run.root / "stages/train/out")
    command = launch_command("pipeline.training.ppo", work, processes, accelerate_config("ddp-cpu", 0))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (run.root / "log").open("w+") as log:
        status = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode
    if status:
        raise RuntimeError(f"the training ended with status {status}:\n{(run.root / 'log').read_text()[-3000:]}")
    rows = [json.loads(line) for line in run.metrics.read_text("utf-8").splitlines()]
    return [row for row in rows if "time/phase" in row][1:]


def samples_per_second(rows: Rows, options: argparse.Namespace, processes: int) -> float:
    """Of all processes together, in the launch's middle phase."""
    return processes * options.rollouts / statistics.median(row["time/phase"] for row in rows)


def show(launches: dict[int, list[Rows]], options: argparse.Namespace) -> None:
    """Speeds of both sides, and their ratio."""
    speeds = {
        processes: [samples_per_second(rows, options, processes) for rows in several]
        for processes, several in launches.items()
    }
    table = []
    for processes, several in launches.items():
        every = [row for rows in several for row in rows]
        parts = (statistics.median(row[name] for row in every) for name in ("time/rollout_generate", "time/train"))
        table.append(
            [f"{processes} of one thread", f"{statistics.median(speeds[processes]):.3f}", *(f"{s:.2f}" for s in parts)]
        )
    print_table(["processes", "samples/s", "sampling s", "optimiser steps s"], table)
    one, many = speeds[1], speeds[options.processes]
    ratios = [b / a for a, b in zip(one, many, strict=True)]
    print_figures([(f"samples/s, {options.processes} processes / 1", ratios, f">= {0.9 * options.processes:.1f}")])


if __name__ == "__main__":
    run_command(main)
