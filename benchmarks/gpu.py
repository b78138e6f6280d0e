"""What a GPU gives: `python benchmarks/gpu.py [--json FILE]`.

GPT-J-6B's shape with random weights in bf16, prompts of 256 and answers of 128 tokens, on one GPU: sampling beside
what memory bandwidth allows, scoring beside what matrix products reach, the update's use of the arithmetic (MFU), and
whole PPO iterations by the trainer's own code, the reward model in the same process. Peaks are measured on the spot,
and looked up by the device's name. Policy and reward model are written to `--folder` first, 12 GB each; the GPU needs
about 60 GB. Without a GPU the same runs in float32 at a tiny size, and says nothing but that it works.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from _common import (
    SHAPES,
    InstantScorer,
    Shape,
    add_options,
    forward_flops,
    make_run,
    one_phase,
    parser_of,
    phases_of,
    quiet,
    read_data,
    save_models,
    settings_of,
    training,
    weights_of,
    workplace,
)
from _figures import (
    copy_bandwidth,
    machine,
    matmul_flops,
    print_figures,
    print_table,
    seconds,
    synchronize,
    write_json,
)

from pipeline.data.preferences import Preference
from pipeline.errors import UserError, run_command
from pipeline.training.metrics import Row
from pipeline.training.prompts import generator_for
from pipeline.training.rollout import Sampler
from pipeline.training.state import TrainState
from pipeline.training.trainer import Trainer

GPTJ_VOCABULARY = 50400
PEAKS = {
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100": (989e12, 3.35e12),
    "A100-SXM4-80GB": (312e12, 2.039e12),
    "A100 80GB PCIe": (312e12, 1.935e12),
    "A100": (312e12, 1.555e12),
    "L40S": (362e12, 0.864e12),
}
"""Dense bf16 operations and bytes a second by the makers' data sheets; the first name that is part of the device's."""
LEAST_MEMORY = 60 * 2**30
"""Bytes of a GPU for the shape gptj-6b."""


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, and write the report where asked for."""
    options = parse(argv)
    report = measure(options)
    show(report, options)
    write_json(options.json, report)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; sizes depend on whether there is a GPU."""
    on_gpu = torch.cuda.is_available()
    parser = parser_of(__doc__)
    sizes = {
        "shape": "gptj-6b" if on_gpu else "gptj-tiny",
        "prompt_tokens": 256 if on_gpu else 32,
        "new_tokens": 128 if on_gpu else 16,
        "rollouts": 64 if on_gpu else 8,
        "decode_rows": "16,64,128" if on_gpu else "2,8",
    }
    add_options(parser, shape=(sizes["shape"], "the policy's, here"))
    parser.add_argument("--reward-shape", choices=SHAPES, help="the reward model's (default: the policy's)")
    add_options(parser, unfrozen=2, prompt_tokens=(sizes["prompt_tokens"], "tokens of each prompt, here"))
    add_options(parser, new_tokens=(sizes["new_tokens"], "tokens of an answer, here"))
    add_options(parser, rollouts=(sizes["rollouts"], "prompts of an iteration, here"))
    add_options(parser, decode_rows=(sizes["decode_rows"], "rows to sample side by side, here"))
    add_options(parser, batch_size=8, epochs=4, rounds=(3, "of each figure, after one more"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, as for submit")
    parser.add_argument("--folder", type=Path, help="where the models are written for the while (default: TMPDIR)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    quiet()
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    if on_gpu:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # as the training's launcher does
        memory = torch.cuda.get_device_properties(0).total_memory
        if options.shape == "gptj-6b" and memory < LEAST_MEMORY:
            raise UserError(f"--shape gptj-6b: needs a GPU of 60 GiB, and this has {memory / 2**30:.0f}; take 160m")
    report: dict[str, Any] = {
        "device": machine(device),
        "options": {name: str(value) for name, value in vars(options).items()},
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_flops": matmul_flops(device, dtype),
        "copy_bytes_per_second": copy_bandwidth(device),
    }
    known = next((peaks for name, peaks in PEAKS.items() if on_gpu and name in torch.cuda.get_device_name()), None)
    if known is not None:
        report["table_flops"], report["table_bytes_per_second"] = known
    with workplace(options.folder) as root:
        run, config = prepare(root, options, device, dtype)
        with training(run, config) as trainer:
            synchronize(device)
            report["decode"] = [
                decode_figures(trainer, rows, options, dtype) for rows in map(int, options.decode_rows.split(","))
            ]
            report["score"] = score_figures(trainer, options)
            report["iteration"] = iteration_figures(trainer, options)
    return report


def prepare(root: Path, options: argparse.Namespace, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Write models of random weights, and a run with prompts of one length."""
    length = options.prompt_tokens + options.new_tokens
    preferences, tokenizer = read_data(None, None, length)
    vocabulary = GPTJ_VOCABULARY if options.shape == "gptj-6b" else len(tokenizer)
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    save_models(root, options.shape, options.reward_shape or options.shape, tokenizer, vocabulary, length, **where)
    if device == "cuda":
        torch.cuda.empty_cache()
    count = max(options.rollouts, *map(int, options.decode_rows.split(",")))
    more = {"model": {"num_layers_unfrozen": options.unfrozen}, "ppo": {"ppo_epochs": options.epochs}}
    sizes = (length, options.new_tokens, options.rollouts, options.batch_size)
    settings = settings_of(*sizes, more, dtype=str(dtype).removeprefix("torch."))
    rows = long_prompts(preferences, tokenizer, options.prompt_tokens, count)
    return make_run(root / "run", root, rows, settings, options.set)


def long_prompts(preferences: Sequence[Preference], tokenizer: Any, tokens: int, count: int) -> list[Preference]:
    """Dialogues one behind the other, until each prompt has so many tokens: what is too much of it is cut."""
    prompts = []
    for number in range(count):
        prompt, place = preferences[number % len(preferences)].prompt, number
        while len(tokenizer(prompt)["input_ids"]) < tokens:
            place += 1
            before = preferences[place % len(preferences)]
            prompt = before.prompt + before.chosen + prompt
        prompts.append(Preference(prompt, " yes", " no"))
    return prompts


def decode_figures(trainer: Trainer, rows: int, options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds of sampling `rows` answers side by side: of prompts and first ids, and of the steps behind them.

    Every step reads all weights but the input's embeddings, and the keys and values of what is there: that many bytes
    at the copy's speed is the least that a step can take.
    """
    device = trainer.sampler.split.device
    prompts = [row.prompt for row in trainer.data.train[:rows]]

    def sampled(new_tokens: int) -> float:
        generate = trainer.sampler.generate.model_copy(update={"max_new_tokens": new_tokens})
        sampler: Sampler = replace(trainer.sampler, generate=generate, scorer=InstantScorer(lambda ids: 0.0))
        generator = generator_for(device, 0, "decode", rows)
        return seconds(lambda: sampler.sample(prompts, generator), device)

    sampled(options.new_tokens)  # not counted: compiles, and fills the allocator
    first = statistics.median(sampled(1) for _ in range(options.rounds))
    whole = [sampled(options.new_tokens) for _ in range(options.rounds)]
    shape = SHAPES[options.shape]
    weights = weights_of(transformers.AutoModelForCausalLM, trainer.sampler.split.whole.config)
    context = options.prompt_tokens + options.new_tokens / 2
    step_bytes = dtype.itemsize * (weights + 2 * shape.layers * shape.width * context * rows)
    return {
        "rows": rows,
        "prefill_seconds": first,
        "steps_seconds": [one - first for one in whole],
        "tokens_per_second": [rows * options.new_tokens / one for one in whole],
        "step_bytes": step_bytes,
        "steps": options.new_tokens - 1,
    }


def score_figures(trainer: Trainer, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of scoring as many dialogues as an iteration has, in the training process."""
    length = options.prompt_tokens + options.new_tokens
    sequences = [[2 + (row + place) % 100 for place in range(length)] for row in range(options.rollouts)]
    scorer, device = trainer.sampler.scorer, trainer.sampler.split.device
    scorer.score(sequences)
    taken = [seconds(lambda: scorer.score(sequences), device) for _ in range(options.rounds)]
    shape: Shape = SHAPES[options.reward_shape or options.shape]
    config = shape.config(trainer.sampler.split.vocab_size, length + 1)
    config.num_labels = 1
    weights = weights_of(transformers.AutoModelForSequenceClassification, config)
    lengths = [length] * options.rollouts
    return {
        "seconds": taken,
        "tokens_per_second": [sum(lengths) / one for one in taken],
        "flops": forward_flops(weights, shape.layers, shape.width, lengths),
    }


def iteration_figures(trainer: Trainer, options: argparse.Namespace) -> dict[str, Any]:
    """Whole iterations of the trainer, and the arithmetic of their optimiser steps.

    Counted is what the update needs: forward and backward (twice the forward) of the trained layers at every position,
    and of the head where an answer's token is predicted. The backward of the lowest one is a little less than that.
    """
    phases, state = phases_of(trainer), TrainState(kl_coefficient=trainer.config.ppo.init_kl_coef)
    rows: list[Row] = []
    for number in range(options.rounds + 1):
        state, row = one_phase(phases, state)
        rows += [row] if number else []
    # The trainer reads a phase's peak, and starts it anew, at the phase's end.
    peak = max(row.get("memory/peak_gpu_gib", row["memory/peak_rss_gib"]) for row in rows)
    shape, split = SHAPES[options.shape], trainer.sampler.split
    layers = sum(weight.numel() for weight in split.top.part.parameters())
    head = sum(weight.numel() for weight in split.top.head.parameters())
    lengths = [options.prompt_tokens + options.new_tokens - 1] * options.rollouts
    layers_flops = forward_flops(layers, options.unfrozen, shape.width, lengths)
    head_flops = 2 * head * options.new_tokens * options.rollouts
    names = ("time/phase", "time/rollout_generate", "time/forward", "time/rollout_score", "time/train")
    return {
        "samples_per_second": [options.rollouts / row["time/phase"] for row in rows],
        "update_flops": 3 * options.epochs * (layers_flops + head_flops),
        "peak_memory_gib": peak,
        **{name: [row[name] for row in rows] for name in names},
        "response_tokens": [row["tokens/response"] for row in rows],
    }


def show(report: dict[str, Any], options: argparse.Namespace) -> None:
    """What the device can do, then each figure beside its aim."""
    print(f"{report['device']}; {report['dtype']}; shape {options.shape}, {options.unfrozen} layers trained; prompts "
          f"of {options.prompt_tokens} and answers of {options.new_tokens} tokens, {options.rollouts} rollouts, "
          f"{options.epochs} epochs, batches of {options.batch_size}; {options.rounds} rounds")  # fmt: skip
    peaks = [["measured", f"{report['matmul_flops'] / 1e12:.2f}", f"{report['copy_bytes_per_second'] / 1e12:.3f}"]]
    if "table_flops" in report:
        peaks.append(
            ["by its maker", f"{report['table_flops'] / 1e12:.2f}", f"{report['table_bytes_per_second'] / 1e12:.3f}"]
        )
    print_table(["peak", "matrix products TFLOP/s", "memory TB/s"], peaks)
    iteration, score = report["iteration"], report["score"]
    parts = ("time/phase", "time/rollout_generate", "time/forward", "time/rollout_score", "time/train")
    middle = [f"{statistics.median(iteration[name]):.3f}" for name in parts]
    print_table(
        ["seconds of", "iteration", "sampling", "estimates", "waiting", "optimiser steps"], [["median", *middle]]
    )
    bandwidth, flops = report["copy_bytes_per_second"], report["matmul_flops"]
    figures: list[tuple[str, list[float], str]] = []
    for one in report["decode"]:
        least = one["steps"] * one["step_bytes"] / bandwidth
        figures.append((f"sampling {one['rows']} rows, tokens/s", one["tokens_per_second"], ""))
        shares = [least / taken for taken in one["steps_seconds"] if taken > 0]
        if shares:  # at a tiny size the steps can be lost in the noise
            figures.append((f"  of the bandwidth limit, {one['rows']} rows", shares, ">= 0.5"))
    figures += [
        ("scoring, tokens/s", score["tokens_per_second"], ""),
        ("  of the matmul peak", [score["flops"] / flops / taken for taken in score["seconds"]], ">= 0.5"),
        (
            "update, of the matmul peak (MFU)",
            [iteration["update_flops"] / flops / taken for taken in iteration["time/train"]],
            "",
        ),
        ("PPO iteration, samples/s a GPU", iteration["samples_per_second"], ">= 8"),
        ("peak memory, GiB", [iteration["peak_memory_gib"]], ""),
    ]
    print_figures(figures)


if __name__ == "__main__":
    run_command(main)
