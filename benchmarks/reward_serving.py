"""What serving costs and saves: `python benchmarks/reward_serving.py [--data FOLDER] [--shape SHAPE]`.

One random model, three ways to score the same calls, round by round in one process: its forward in this process, this
project's server and client, and the way of the original's client (all rows padded to the call's longest, requests of 24
one after the other, a server that does not batch) against the same model. Each ratio is of one round; the table gives
their median and range. FOLDER is a data folder (train.jsonl[.gz], test.jsonl[.gz]); without it the demo's texts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import (
    SHAPES,
    add_data_options,
    add_options,
    forward_flops,
    parser_of,
    quiet,
    read_data,
    record,
    save_reward_model,
    workplace,
)
from _figures import matmul_flops, print_figures, seconds

from pipeline.config.load import check, dump
from pipeline.config.schema import Config
from pipeline.data.tokens import encode_pair
from pipeline.errors import run_command
from pipeline.run.directory import RunDir
from pipeline.serving import wire
from pipeline.serving.client import connect_scorer
from pipeline.serving.convert import convert
from pipeline.serving.engines import Engine
from pipeline.serving.model_store import model_folder, read_manifest
from pipeline.serving.sandbox import open_sandbox, prepare
from pipeline.serving.scorer import Scorer
from pipeline.serving.scoring import RewardModel
from pipeline.serving.service import supervise

MAX_LENGTH = 1024
ORIGINAL_ROWS = 24
"""Rows of a request of the original's client."""
Calls = list[list[list[int]]]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = parser_of(__doc__)
    add_data_options(parser)
    add_options(parser, shape="demo", rounds=(5, "rounds"), threads=(1, "CPU threads of model and server"))
    parser.add_argument("--calls", type=int, default=3, help="calls a round (default: 3)")
    parser.add_argument("--rows", type=int, default=128, help="sequences a call (default: 128)")
    options = parser.parse_args(argv)
    quiet()
    torch.set_num_threads(options.threads)
    calls, vocabulary = read_calls(options)
    with workplace() as root:
        measure(root, options, calls, vocabulary)


def read_calls(options: argparse.Namespace) -> tuple[Calls, int]:
    """Calls of prompt and chosen answer as token ids, and the size of their vocabulary."""
    preferences, tokenizer = read_data(options.data, options.vocabulary, MAX_LENGTH)
    pairs = (
        encode_pair(tokenizer, one.prompt, one.chosen, MAX_LENGTH)
        for one in preferences[: options.calls * options.rows]
    )
    rows = [prompt + answer for prompt, answer in pairs]
    return [rows[start : start + options.rows] for start in range(0, len(rows), options.rows)], len(tokenizer)


def measure(root: Path, options: argparse.Namespace, calls: Calls, vocabulary: int) -> None:
    """Make the model, serve it, and time all sides."""
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", "bfloat16") if on_gpu else ("cpu", "float32")
    where = {"device": device, "dtype": getattr(torch, dtype)}
    save_reward_model(root / "model", SHAPES[options.shape], None, vocabulary, MAX_LENGTH, **where)
    serving = {"dtype": dtype, "max_length": MAX_LENGTH, "num_threads": options.threads, "bind": "unix"}
    one_forward = {"dynamic_batching": False, "max_batch_tokens": ORIGINAL_ROWS * MAX_LENGTH}
    ours, ours_run = converted(root / "ours", serving)
    original, original_run = converted(root / "original", {**serving, **one_forward})
    store = ours_run.artifact("convert", "model_store")
    model = RewardModel(
        model_folder(store, read_manifest(store).model_name),
        device,
        dtype,
        max_length=MAX_LENGTH,
        max_batch_tokens=ours.serving.max_batch_tokens,
        max_batch_size=ours.serving.max_batch_size,
    )
    devices = ["0"] if on_gpu else []
    log = root / "log"
    with open_sandbox(prepare(ours, log, print), log) as engine:
        ready = [ready_s(ours_run, ours, engine, devices, log) for _ in range(3)]
        with (
            server(ours_run, ours, engine, devices, log) as scorer,
            supervise(original_run, original, engine, devices, log, "original") as plain,
        ):
            client = wire.open_client(wire.parse_address(plain.triton_host))
            name = read_manifest(store).model_name
            sides: dict[str, Callable[[Calls], object]] = {
                "eager": lambda some: [model.score(call) for call in some],
                "served": lambda some: [scorer.score(call) for call in some],
                "original": lambda some: [original_way(client, name, call) for call in some],
            }
            padding = padding_of(model, calls)
            for side in sides.values():
                side(calls[:1])
            peak = matmul_flops(device, getattr(torch, dtype))
            rounds = [
                {name: seconds(lambda side=side: side(calls)) for name, side in sides.items()}
                for _ in range(options.rounds)
            ]
            added = added_latency_ms(model, scorer, calls)
            client.close()
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {options.threads} thread(s)"
    print_table(where, options.shape, Figures(calls, model, rounds, added, ready, padding, peak))


def converted(root: Path, serving: dict[str, Any]) -> tuple[Config, RunDir]:
    """A run in which the benchmark's model is converted."""
    config, run = check({"serving": serving, "sandbox": {"engine": "venv"}}), RunDir(root)
    root.mkdir()
    run.config.write_text(dump(config))
    manifest = convert(root.parent / "model", root / "model_store", config.serving)
    values = {"identity": manifest.identity, "model_name": manifest.model_name}
    record(run, "convert", "model_store", root / "model_store", **values)
    return config, run


def ready_s(run: RunDir, config: Config, engine: Engine, devices: list[str], log: Path) -> float:
    """Seconds from the start of a server until it has given the known answers and is published."""
    started = time.perf_counter()
    with supervise(run, config, engine, devices, log, "ready"):
        return time.perf_counter() - started


@contextmanager
def server(run: RunDir, config: Config, engine: Engine, devices: list[str], log: Path) -> Iterator[Scorer]:
    """A client of the run's server."""
    with supervise(run, config, engine, devices, log, "ours"):
        scorer = connect_scorer(run, config, {})
        try:
            yield scorer
        finally:
            scorer.close()


def original_way(client: Any, model: str, call: list[list[int]]) -> None:
    """All rows are as long as the longest, and the model computes all of it."""
    width = max(map(len, call))
    for start in range(0, len(call), ORIGINAL_ROWS):
        rows = [row + [0] * (width - len(row)) for row in call[start : start + ORIGINAL_ROWS]]
        wire.infer(client, model, rows, timeout_s=600.0)


def added_latency_ms(model: RewardModel, scorer: Scorer, calls: Calls, times: int = 41) -> list[float]:
    """What a request of one sequence of middle length takes beyond the forward before it."""
    rows = sorted((row for call in calls for row in call), key=len)
    one = rows[len(rows) // 2]
    added = []
    for _ in range(times):
        alone = seconds(lambda: model.score([one]))
        added.append(1e3 * (seconds(lambda: scorer.score([one])) - alone))
    return added


def padding_of(model: RewardModel, calls: Calls) -> float:
    """The share of the computed tokens that is padding."""
    computed = []
    hook = model.model.base_model.register_forward_pre_hook(
        lambda _module, _args, inputs: computed.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    for call in calls:
        model.score(call)
    hook.remove()
    return 1 - sum(len(row) for call in calls for row in call) / sum(computed)


def model_flops(model: RewardModel, calls: Calls) -> float:
    """Operations that the sequences' own tokens need."""
    config = model.model.config
    weights = sum(parameter.numel() for parameter in model.model.parameters())
    weights -= model.model.get_input_embeddings().weight.numel()
    lengths = [len(row) for call in calls for row in call]
    return forward_flops(weights, config.num_hidden_layers, config.hidden_size, lengths)


@dataclass(frozen=True)
class Figures:
    """All that was measured."""

    calls: Calls
    model: RewardModel
    rounds: list[dict[str, float]]
    """Seconds of each side."""
    added_ms: list[float]
    ready_s: list[float]
    padding: float
    peak: float


def print_table(where: str, shape: str, figures: Figures) -> None:
    """Speeds first, then each figure beside its aim."""
    lengths = [len(row) for call in figures.calls for row in call]
    print(f"{where}; shape {shape}; {len(figures.calls)} calls, {len(lengths)} sequences of {min(lengths)} to "
          f"{max(lengths)} tokens (mean {statistics.mean(lengths):.0f}); {len(figures.rounds)} rounds")  # fmt: skip
    print(f"\n{'side':<12}{'sequences/s':>13}{'tokens/s':>12}{'of matmul peak':>16}")
    flops = model_flops(figures.model, figures.calls)
    for side in figures.rounds[0]:
        middle = statistics.median(one[side] for one in figures.rounds)
        print(f"{side:<12}{len(lengths) / middle:>13.1f}{sum(lengths) / middle:>12.0f}"
              f"{flops / middle / figures.peak:>16.2f}")  # fmt: skip
    rows = [
        ("served / eager forward", [one["eager"] / one["served"] for one in figures.rounds], ">= 0.95"),
        ("served / the original's way", [one["original"] / one["served"] for one in figures.rounds], ">= 3"),
        ("padding, share of tokens", [figures.padding], "<= 0.05"),
        ("added latency of a request, ms", figures.added_ms, "<= 3"),
        ("server ready, s", figures.ready_s, "< 5 (demo)"),
    ]
    if torch.cuda.is_available():
        served = [flops / one["served"] / figures.peak for one in figures.rounds]
        rows.append(("of matmul peak (GPU, bfloat16)", served, "0.5"))
    print_figures(rows)


if __name__ == "__main__":
    run_command(main)
