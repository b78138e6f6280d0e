"""How long training waits for rewards: `python benchmarks/scoring_hidden.py [--data FOLDER]`.

The trainer's own phases, with rewards from a real tritonserver that has a core of its own, and, in turns, from the
same reward model in the training process. The time waited is what the trainer records as time/rollout_score: from
when it has nothing else to do before the first update until the last score is there. A second training is scored only
once all is sampled, which is how long scoring takes where it is not hidden.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from _common import (
    add_data_options,
    add_options,
    make_run,
    one_phase,
    parser_of,
    phases_of,
    quiet,
    read_data,
    record,
    save_models,
    settings_of,
    training,
    workplace,
)
from _figures import alternate, machine, print_figures, print_table

from pipeline.config.schema import Config
from pipeline.errors import run_command
from pipeline.run.directory import RunDir
from pipeline.serving.convert import convert
from pipeline.serving.sandbox import open_sandbox, prepare
from pipeline.serving.scorer import Scorer
from pipeline.serving.service import supervise
from pipeline.training.metrics import Row
from pipeline.training.state import TrainState
from pipeline.training.trainer import Trainer

SIDES = {"server": "a server, as each answer ends", "in turn": "a server, after all answers", "local": "this process"}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    show(measure(parse(argv)))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    add_data_options(parser)
    add_options(parser, shape=("peers", "the policy's"), reward_shape="demo", rounds=5, rollouts=32, new_tokens=128)
    add_options(parser, seq_length=512, threads=(1, "CPU threads of trainer and of server"))
    return parser.parse_args(argv)


def measure(options: argparse.Namespace) -> dict[str, list[Row]]:
    """The rows that the trainers record of their phases."""
    quiet()
    torch.set_num_threads(options.threads)
    preferences, tokenizer = read_data(options.data, options.vocabulary, options.seq_length)
    more = {"serving": {"num_threads": options.threads, "bind": "unix"}, "sandbox": {"engine": "venv"}}
    settings = settings_of(options.seq_length, options.new_tokens, options.rollouts, 8, more)
    with workplace() as root, contextlib.ExitStack() as stack:
        save_models(root, options.shape, options.reward_shape, tokenizer, len(tokenizer), options.seq_length)
        runs = {name: make_run(root / name, root, preferences, settings) for name in ("served", "local")}
        run, config = runs["served"]
        manifest = convert(root / "reward", run.root / "model_store", config.serving)
        store = {"identity": manifest.identity, "model_name": manifest.model_name}
        record(run, "convert", "model_store", run.root / "model_store", **store)
        sides = {"local": stack.enter_context(training(*runs["local"]))}
        log = root / "server.log"
        engine = stack.enter_context(open_sandbox(prepare(config, log, print), log))
        service = stack.enter_context(supervise(run, config, engine, [], log, "benchmark"))
        sides["server"] = stack.enter_context(training(*served(runs["served"])))
        late = replace(sides["server"].sampler, scorer=LateScorer(sides["server"].sampler.scorer))
        print(f"{machine()}; policy {options.shape}, reward model {options.reward_shape}; {options.rollouts} rollouts "
              f"of {options.new_tokens} tokens; {options.rounds} rounds")  # fmt: skip
        turns = {
            "server": iterations(sides["server"], service.tick),
            "in turn": iterations(sides["server"], service.tick, sampler=late),
            "local": iterations(sides["local"], service.tick),
        }
        return alternate(turns, options.rounds)


def served(run: tuple[RunDir, Config]) -> tuple[RunDir, Config]:
    """The run, whose server is published: its training finds it there."""
    assert run[0].endpoint.exists()
    return run


def iterations(trainer: Trainer, tick: Callable[[], Any], **changed: Any) -> Callable[[], Row]:
    """Gives the row of the next phase; lets the server's supervisor look after it before."""
    phases = phases_of(trainer, **changed)
    state = TrainState(kl_coefficient=trainer.config.ppo.init_kl_coef)

    def iteration() -> Row:
        nonlocal state
        tick()
        state, row = one_phase(phases, state)
        return row

    return iteration


class LateScorer:
    """Hands requests on only when somebody waits for them: scoring behind everything else."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scorer, name)

    def submit(self, sequences: Sequence[Sequence[int]]) -> _Late:
        """Nothing yet."""
        return _Late(self.scorer, [list(sequence) for sequence in sequences])


class _Late:
    """What `LateScorer` gives for a future."""

    def __init__(self, scorer: Scorer, rows: list[list[int]]) -> None:
        self.scorer, self.rows = scorer, rows

    def result(self) -> list[float]:
        return self.scorer.score(self.rows)


def show(rows: dict[str, list[Row]]) -> None:
    """Seconds of all sides, and the share of an iteration that is spent waiting."""
    names = ("time/phase", "time/rollout_generate", "time/rollout_score")
    table = [
        [SIDES[side], *(f"{statistics.median(row[name] for row in rows[side]):.3f}" for name in names)]
        for side in SIDES
    ]
    print_table(["rewards from", "iteration s", "sampling s", "waiting s"], table)
    print_figures(
        [
            (f"waiting, {SIDES[side]}", [row["time/rollout_score"] / row["time/phase"] for row in rows[side]], aim)
            for side, aim in (("server", "<= 0.02"), ("in turn", ""), ("local", ""))
        ]
    )


if __name__ == "__main__":
    run_command(main)
