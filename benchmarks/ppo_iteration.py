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
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
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
    save_policy,
    save_reward_model,
    training,
)

from pipeline.data.preferences import Preference
from pipeline.data.tokens import encode
from pipeline.errors import run_command
from pipeline.serving.usage import Traffic
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_options(parser)
    parser.add_argument("--venv", type=Path, help="TRL's virtual environment; without it TRL is left out")
    parser.add_argument("--work", default=",".join(WORK), help=f"what to train: some of {', '.join(WORK)} (default)")
    parser.add_argument("--shape", choices=SHAPES, default="peers", help="the model's (default: peers)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, after one that does not count (default: 3)")
    parser.add_argument("--rollouts", type=int, default=32, help="prompts of an iteration (default: 32)")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of an answer (default: 128)")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens of the longest dialogue (default: 512)")
    parser.add_argument("--batch-size", type=int, default=8, help="rollouts of an optimiser step (default: 8)")
    parser.add_argument(
        "--micro-tokens", type=int, default=1024, help="of a forward here (default: 1024); TRL has none"
    )
    parser.add_argument("--epochs", type=int, default=4, help="epochs of an iteration (default: 4)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each side (default: 2)")
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
    with tempfile.TemporaryDirectory(prefix="hh-benchmark-") as folder, contextlib.ExitStack() as sides:
        root = Path(folder)
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
    room, vocabulary = options.seq_length - options.new_tokens, len(tokenizer)
    order = torch.randperm(len(preferences), generator=torch.Generator().manual_seed(SEED)).tolist()
    rows, prompts = [], []
    for place in order:
        ids = encode(tokenizer, preferences[place].prompt)
        if len(ids) <= room and len(rows) < options.rollouts:
            rows.append(preferences[place])
            prompts.append(ids)
    # A position more: this project puts an EOS behind every answer for the reward model.
    sizes = (SHAPES[options.shape], tokenizer, vocabulary, options.seq_length + 1)
    save_policy(root / "policy", *sizes)
    save_reward_model(root / "reward", *sizes)
    return rows, prompts


def token_reward(ids: Sequence[int]) -> float:
    """The reward: what prompt and answer (without the EOS behind it) are worth a token, as in trl_worker.py."""
    return statistics.fmean((token % PERIOD) / PERIOD for token in ids[:-1])


class TokenScorer:
    """A `Scorer` of `token_reward`."""

    identity = None

    def submit(self, sequences: Sequence[Sequence[int]]) -> Future[list[float]]:
        """Done at once."""
        future: Future[list[float]] = Future()
        future.set_result([token_reward(sequence) for sequence in sequences])
        return future

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """`submit` and wait."""
        return self.submit(sequences).result()

    def traffic(self) -> Traffic:
        """Nothing goes anywhere."""
        return Traffic()

    def close(self) -> None:
        """Nothing to close."""


@contextlib.contextmanager
def our_iterations(
    root: Path, work: str, rows: Sequence[Preference], options: argparse.Namespace, profile: cProfile.Profile | None
) -> Iterator[Callable[[], Report]]:
    """Gives the next iteration of this project's trainer."""
    settings: dict[str, Any] = {
        "seed": SEED,
        "train": {
            "seq_length": options.seq_length,
            "batch_size": options.batch_size,
            "micro_batch_tokens": options.micro_tokens,
        },
        "ppo": {"num_rollouts": len(rows), "chunk_size": len(rows), "ppo_epochs": options.epochs},
        "generate": {"max_new_tokens": options.new_tokens},
        "optimizer": {"lr": LR},
        "serving": {"dtype": "float32", "max_length": options.seq_length + 1},
    }
    for section, values in WORK[work][0].items():
        settings[section] = {**settings.get(section, {}), **values}
    run, config = make_run(root, root.parent / "policy", root.parent / "reward", rows, settings)
    with training(run, config) as trainer:
        phases = phases_of(trainer, sampler=replace(trainer.sampler, scorer=TokenScorer()))
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
