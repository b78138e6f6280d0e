"""One PPO iteration beside TRL's: `python benchmarks/ppo_iteration.py --venv FOLDER [--data FOLDER]`.

One policy, the same prompts, answers of one length (neither side ever ends one), and one reward function of the
tokens that costs next to nothing; the sides take turns, iteration by iteration. TRL 1.12.0, the last with PPO, trains
all layers and a critic of its own, from a virtual environment that is made in FOLDER where there is none. This
project's iteration is that of its trainer, with as much as `--work` says trained:

top     the top two layers and a value head, as its presets do
critic  all layers and a critic of the reward model's size: TRL's work
all     all layers and a value head
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _common import (
    InstantScorer,
    add_data_options,
    add_options,
    make_run,
    one_phase,
    parser_of,
    phases_of,
    prompts_of,
    quiet,
    read_data,
    save_models,
    settings_of,
    training,
    workplace,
)
from _figures import alternate, machine, print_figures, print_table

from pipeline.data.preferences import Preference
from pipeline.errors import run_command
from pipeline.training.state import TrainState

PEER = ("trl==1.12.0", "transformers==5.23.0", "accelerate==1.15.0", "torch==2.13.0")
WORKER = Path(__file__).with_name("trl_worker.py")
WORK: dict[str, tuple[dict[str, Any], str]] = {
    "top": ({"model": {"num_layers_unfrozen": 2}}, ">= 8"),
    "critic": ({"model": {"num_layers_unfrozen": -1}, "ppo": {"critic": "model"}}, ">= 2.5"),
    "all": ({"model": {"num_layers_unfrozen": -1}}, ">= 2.5"),
}
"""Settings, and the aim: how many times as fast as TRL."""
PERIOD = 97
"""Of `token_reward`."""
SEED = 7
LR = 8e-6

Report = dict[str, float]
"""Of one iteration: seconds, of which "generate", sampled "tokens", mean "score"."""


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    show(measure(parse(argv)))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    add_data_options(parser)
    parser.add_argument("--venv", type=Path, help="TRL's virtual environment; without it TRL is left out")
    parser.add_argument("--work", default=",".join(WORK), help=f"what to train: some of {', '.join(WORK)} (default)")
    add_options(parser, shape="peers", rounds=3, rollouts=32, new_tokens=128, seq_length=512, batch_size=8, epochs=4)
    add_options(parser, threads=(2, "CPU threads of each side"))
    parser.add_argument(
        "--micro-tokens", type=int, default=1024, help="of a forward here (default: 1024); TRL has none"
    )
    parser.add_argument(
        "--profile",
        type=Path,
        help="write a cProfile (CPU time of the main thread) of this project's iterations to this file",
    )
    return parser.parse_args(argv)


def measure(options: argparse.Namespace) -> dict[str, list[Report]]:
    """Each side's iterations."""
    quiet()
    torch.set_num_threads(options.threads)
    with workplace() as root, contextlib.ExitStack() as sides:
        rows, prompts = make_models(root, options)
        profile = cProfile.Profile(time.thread_time) if options.profile else None
        takes_turns: dict[str, Callable[[], Report]] = {}
        if options.venv:
            python = peer_python(options.venv)
            takes_turns["TRL"] = sides.enter_context(trl_iterations(python, root, prompts, options))
        for work in options.work.split(","):
            takes_turns[work] = sides.enter_context(our_iterations(root / work, work, rows, options, profile))
        lengths = [len(prompt) for prompt in prompts]
        print(f"{machine()}; shape {options.shape}; {len(rows)} prompts of {min(lengths)} to {max(lengths)} tokens "
              f"(mean {statistics.mean(lengths):.0f}), {options.new_tokens} new tokens, {options.epochs} epochs, "
              f"batches of {options.batch_size}; {options.rounds} rounds", flush=True)  # fmt: skip
        reports = alternate(takes_turns, options.rounds)
    if profile is not None:
        pstats.Stats(profile).dump_stats(options.profile)
    return reports


def show(reports: dict[str, list[Report]]) -> None:
    """Seconds of each side first, then ratios of one round each."""
    names = ("seconds", "generate", "tokens", "score")
    rows = [
        [side, *(f"{statistics.median(one[name] for one in reports[side]):.{2 if name != 'score' else 4}f}"
                 for name in names)]
        for side in reports
    ]  # fmt: skip
    print_table(["median of an iteration", "seconds", "of it sampling", "tokens sampled", "mean score"], rows)
    if "TRL" in reports:
        ours = [work for work in WORK if work in reports]
        print_figures(
            [
                (
                    f"TRL's seconds / those of '{work}'",
                    [peer["seconds"] / one["seconds"] for peer, one in zip(reports["TRL"], reports[work], strict=True)],
                    WORK[work][1],
                )
                for work in ours
            ]
        )


def make_models(root: Path, options: argparse.Namespace) -> tuple[list[Preference], list[list[int]]]:
    """Write policy and reward model; choose the prompts among those that need not be cut."""
    preferences, tokenizer = read_data(options.data, options.vocabulary, options.seq_length)
    rows, prompts = prompts_of(preferences, tokenizer, options.seq_length - options.new_tokens, options.rollouts)
    save_models(root, options.shape, options.shape, tokenizer, len(tokenizer), options.seq_length)
    return rows, prompts


def token_reward(ids: Sequence[int]) -> float:
    """The reward: what prompt and answer (without the EOS behind it) are worth a token, as in trl_worker.py."""
    return statistics.fmean((token % PERIOD) / PERIOD for token in ids[:-1])


@contextlib.contextmanager
def our_iterations(
    root: Path, work: str, rows: Sequence[Preference], options: argparse.Namespace, profile: cProfile.Profile | None
) -> Iterator[Callable[[], Report]]:
    """Gives the next iteration of this project's trainer."""
    more = {
        "seed": SEED,
        "train": {"micro_batch_tokens": options.micro_tokens},
        "ppo": {"ppo_epochs": options.epochs},
        "optimizer": {"lr": LR},
    }
    sizes = (options.seq_length, options.new_tokens, len(rows), options.batch_size)
    run, config = make_run(root, root.parent, rows, settings_of(*sizes, more, WORK[work][0]))
    with training(run, config) as trainer:
        phases = phases_of(trainer, sampler=replace(trainer.sampler, scorer=InstantScorer(token_reward)))
        state = TrainState(kl_coefficient=config.ppo.init_kl_coef)

        def iteration() -> Report:
            nonlocal state
            if profile is not None:
                profile.enable()
            state, row = one_phase(phases, state)
            if profile is not None:
                profile.disable()
            return {
                "seconds": row["time/phase"],
                "generate": row["time/rollout_generate"],
                "tokens": row["tokens/response"],
                "score": row["rollout_scores/mean"],
            }

        yield iteration


@contextlib.contextmanager
def trl_iterations(
    python: Path, root: Path, prompts: list[list[int]], options: argparse.Namespace
) -> Iterator[Callable[[], Report]]:
    """Gives the next iteration of TRL's trainer, which waits in a process of its own."""
    settings = {
        "policy": str(root / "policy"),
        "reward": str(root / "reward"),
        "out": str(root / "trl"),
        "prompts": prompts,
        "new_tokens": options.new_tokens,
        "batch_size": options.batch_size,
        "epochs": options.epochs,
        "threads": options.threads,
        "period": PERIOD,
        "seed": SEED,
        "lr": LR,
    }
    (root / "trl.json").write_text(json.dumps(settings), "utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    with (root / "trl.log").open("w+") as log:
        worker = subprocess.Popen(
            [python, WORKER, root / "trl.json"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
        )  # fmt: skip
        assert worker.stdin is not None
        assert worker.stdout is not None
        stdin, stdout = worker.stdin, worker.stdout

        def iteration() -> Report:
            with contextlib.suppress(BrokenPipeError):  # its log says why
                stdin.write("go\n")
                stdin.flush()
            line = stdout.readline()
            if not line:
                raise RuntimeError(f"TRL's process has ended:\n{(root / 'trl.log').read_text('utf-8')[-3000:]}")
            report: Report = json.loads(line)
            return report

        try:
            yield iteration
        finally:
            worker.kill()
            worker.wait()


def peer_python(folder: Path) -> Path:
    """The interpreter of TRL's environment, which is made where there is none."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"{folder}: makes an environment of {', '.join(PEER)}; takes a few minutes", file=sys.stderr)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEER], check=True)
    return python


if __name__ == "__main__":
    run_command(main)
