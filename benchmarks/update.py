"""What keeping the frozen trunk's states saves: `python benchmarks/update.py [--data FOLDER]`.

One phase's answers are sampled once. Then their update phase (log-probabilities, values and reference, and all
epochs) runs again and again, by the trainer's own code: with the hidden states that sampling kept at the cut, and with
the same trunk run anew, without gradients, before every forward of a top. The shape is the original's, GPT-J with the
top 2 of 28 layers trained, but narrow; by default the vocabulary is in proportion, so that the head weighs as much
beside a layer as GPT-J's does.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from _common import (
    SHAPES,
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

from pipeline.errors import run_command
from pipeline.training.metrics import Row
from pipeline.training.packed import attention_of
from pipeline.training.state import TrainState
from pipeline.training.trainer import Trainer

HEAD_PER_WIDTH = 50400 / 4096
"""GPT-J's vocabulary by its width."""
SIDES = ("kept", "anew")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    show(measure(parse(argv)))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    add_data_options(parser, vocabulary="in proportion to the width")
    add_options(parser, shape="gptj-narrow", unfrozen=2, rounds=5, rollouts=(16, "prompts of the phase"))
    add_options(parser, new_tokens=128, seq_length=1024, batch_size=4, epochs=(4, "epochs"), threads=2)
    return parser.parse_args(argv)


def measure(options: argparse.Namespace) -> dict[str, list[Row]]:
    """The rows that the trainer records of its phases, of each side."""
    quiet()
    torch.set_num_threads(options.threads)
    shape = SHAPES[options.shape]
    vocabulary = options.vocabulary or max(512, round(shape.width * HEAD_PER_WIDTH))
    preferences, tokenizer = read_data(options.data, vocabulary, options.seq_length)
    rows, prompts = prompts_of(preferences, tokenizer, options.seq_length - options.new_tokens, options.rollouts)
    mean = statistics.mean(map(len, prompts))
    more = {"model": {"num_layers_unfrozen": options.unfrozen}, "ppo": {"ppo_epochs": options.epochs}}
    settings = settings_of(options.seq_length, options.new_tokens, len(rows), options.batch_size, more)
    with workplace() as root:
        save_models(root, options.shape, "tiny", tokenizer, vocabulary, options.seq_length)
        run, config = make_run(root / "run", root, rows, settings)
        with training(run, config) as trainer:
            print(f"{machine()}; shape {options.shape}, {options.unfrozen} of {shape.layers} layers trained, "
                  f"vocabulary {vocabulary}; {len(rows)} answers of {options.new_tokens} tokens to prompts of "
                  f"{mean:.0f}, {options.epochs} epochs, batches of {options.batch_size}; {options.rounds} rounds",
                  flush=True)  # fmt: skip
            return alternate(sides_of(trainer), options.rounds)


def sides_of(trainer: Trainer) -> dict[str, Callable[[], Row]]:
    """One update phase over the same answers and from the same weights, of each side."""
    state = TrainState(kl_coefficient=trainer.config.ppo.init_kl_coef)
    policy, optimizer = trainer.updater.policy, trainer.updater.optimizer
    weights = [(parameter, parameter.detach().clone()) for parameter in policy.parameters()]
    kept = Remembered(trainer.sampler)

    def phase(sampler: Any) -> Row:
        with torch.no_grad():
            for parameter, start in weights:
                parameter.copy_(start)
        optimizer.state.clear()
        return one_phase(phases_of(trainer, sampler=sampler), state)[1]

    def anew() -> Row:
        with trunk_before_each_forward(trainer):
            return phase(kept.with_ids_for_states())

    phase(kept)  # samples
    return {"kept": lambda: phase(kept), "anew": anew}


class Remembered:
    """A sampler that gives the answers of its first call, with their scores, again and again."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.sampled: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def sample(self, *arguments: Any, **named: Any) -> Any:
        """As the sampler's."""
        if self.sampled is None:
            self.sampled = self.sampler.sample(*arguments, **named)
        return self.sampled

    def with_ids_for_states(self) -> Remembered:
        """The same answers, with the ids (P + R - 1, 1) in the place of the hidden states that they lead to."""
        responses, scores = self.sampled
        twin = Remembered(self.sampler)
        # Of the states' dtype, which float32 makes exact for every vocabulary.
        ids = [
            response.states.new_tensor([*response.prompt, *response.tokens[:-1]], dtype=torch.float32)[:, None]
            for response in responses
        ]
        kept = []
        for response, column in zip(responses, ids, strict=True):
            changed = copy.copy(response)
            object.__setattr__(changed, "states", column)
            kept.append(changed)
        twin.sampled = (kept, scores)
        return twin


@contextlib.contextmanager
def trunk_before_each_forward(trainer: Trainer) -> Iterator[None]:
    """Switch off what the states are kept for: policy's and reference's tops take ids (1, T, 1) in their place."""
    trunk = trainer.sampler.split.trunk

    def states_of(_part: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        ids, *rest = arguments
        with torch.no_grad(), attention_of(trunk):
            states = trunk(ids.squeeze(-1).long(), *rest, **named)  # (1, T, H)
        return (states, *rest), named

    policy = trainer.updater.accelerator.unwrap_model(trainer.updater.policy)
    with contextlib.ExitStack() as hooks:
        for top in (policy.top, trainer.reference):
            hooks.callback(top.part.register_forward_pre_hook(states_of, with_kwargs=True).remove)
        yield


def seconds_of(row: Row) -> tuple[float, float]:
    """Of the estimates before the first step, and of the optimiser steps."""
    return row["time/forward"], row["time/train"]


def difference(rows: dict[str, list[Row]]) -> float:
    """The largest difference of what the sides record of one phase: losses, KL, gradient norm, values; no times."""
    kept, anew = rows["kept"][0], rows["anew"][0]
    names = [
        name
        for name, value in kept.items()
        if isinstance(value, float)
        and name.startswith(("losses/", "policy/", "values/", "old_values/", "returns/", "grad_norm", "ratio"))
    ]
    assert {"losses/policy_loss", "losses/value_loss", "grad_norm"} <= set(names)
    return max(abs(kept[name] - anew[name]) for name in names if math.isfinite(kept[name]))


def show(rows: dict[str, list[Row]]) -> None:
    """Seconds of both sides, ratios, and how far the losses are apart."""
    table = []
    for side in SIDES:
        estimates, steps = (statistics.median(values) for values in zip(*map(seconds_of, rows[side]), strict=True))
        losses = (rows[side][0][f"losses/{name}_loss"] for name in ("policy", "value"))
        table.append([f"trunk {side}", f"{estimates:.3f}", f"{steps:.3f}", *(f"{loss:.7f}" for loss in losses)])
    print_table(["median of a phase", "estimates s", "steps s", "policy loss", "value loss"], table)
    pairs = list(zip(map(seconds_of, rows["anew"]), map(seconds_of, rows["kept"]), strict=True))
    print_figures(
        [
            ("update phase, anew / kept", [sum(anew) / sum(kept) for anew, kept in pairs], ">= 8"),
            ("optimiser steps alone, anew / kept", [anew[1] / kept[1] for anew, kept in pairs], ""),
        ]
    )
    print(f"\nlargest difference of losses, gradient norm, KL and values: {difference(rows):.1e}")


if __name__ == "__main__":
    run_command(main)
