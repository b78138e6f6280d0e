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
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _common import (
    SHAPES,
    add_data_options,
    alternate,
    machine,
    make_run,
    one_phase,
    phases_of,
    print_figures,
    print_table,
    quiet,
    read_data,
    record,
    save_policy,
    save_reward_model,
    training,
)

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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_options(parser)
    parser.add_argument("--shape", choices=SHAPES, default="peers", help="the policy's (default: peers)")
    parser.add_argument("--reward-shape", choices=SHAPES, default="demo", help="the reward model's (default: demo)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, after one that does not count (default: 5)")
    parser.add_argument("--rollouts", type=int, default=32, help="prompts of an iteration (default: 32)")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of an answer (default: 128)")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens of the longest dialogue (default: 512)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of trainer and of server (default: 1)")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace) -> dict[str, list[Row]]:
    """The rows that the trainers record of their phases."""
    quiet()
    torch.set_num_threads(options.threads)
    preferences, tokenizer = read_data(options.data, options.vocabulary, options.seq_length)
    settings = {
        "train": {"seq_length": options.seq_length, "batch_size": 8},
        "ppo": {"num_rollouts": options.rollouts, "chunk_size": options.rollouts},
        "generate": {"max_new_tokens": options.new_tokens},
        "serving": {
            "dtype": "float32",
            "max_length": options.seq_length + 1,
            "num_threads": options.threads,
            "bind": "unix",
        },
        "sandbox": {"engine": "venv"},
    }
    with tempfile.TemporaryDirectory(prefix="hh-benchmark-") as folder, contextlib.ExitStack() as stack:
        root = Path(folder)
        sizes = (tokenizer, len(tokenizer), options.seq_length + 1)
        save_policy(root / "policy", SHAPES[options.shape], *sizes)
        save_reward_model(root / "reward", SHAPES[options.reward_shape], *sizes)
        runs = {
            name: make_run(root / name, root / "policy", root / "reward", preferences, settings)
            for name in ("served", "local")
        }
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
