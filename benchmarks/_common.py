"""What the benchmarks share: models made on the spot, a run to train in, alternating rounds, and tables."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from pipeline.config.load import check, dump, merge, resolve
from pipeline.config.schema import Config
from pipeline.data.embedded import build_tokenizer
from pipeline.data.preferences import Preference, write_jsonl
from pipeline.data.sources import load_source
from pipeline.run import atomic
from pipeline.run.directory import Artifact, Outputs, RunDir
from pipeline.run.work import Progress
from pipeline.training import ppo
from pipeline.training.metrics import Row
from pipeline.training.phase import Phases
from pipeline.training.ranks import Ranks
from pipeline.training.reward_source import LEDGER, RewardSource
from pipeline.training.state import TrainState
from pipeline.training.stop import StopRequest
from pipeline.training.trainer import Trainer


@dataclass(frozen=True)
class Shape:
    """An architecture and its sizes, without vocabulary and positions."""

    kind: str
    width: int
    layers: int
    heads: int

    def config(self, vocabulary: int, positions: int) -> Any:
        """The transformers configuration; no dropout, nothing tied."""
        sizes: dict[str, Any] = {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": 4 * self.width,
            "max_position_embeddings": positions,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }
        if self.kind == "gptj":
            sizes = {
                "n_embd": self.width,
                "n_layer": self.layers,
                "n_head": self.heads,
                "n_positions": positions,
                "rotary_dim": min(64, self.width // self.heads // 4 * 2),
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
            }
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
        return transformers.AutoConfig.for_model(
            self.kind, vocab_size=vocabulary, tie_word_embeddings=False, **ids, **sizes
        )


SHAPES = {
    "tiny": Shape("gpt_neox", 32, 3, 2),
    "demo": Shape("gpt_neox", 192, 4, 4),
    "peers": Shape("gpt_neox", 256, 12, 4),
    "160m": Shape("gpt_neox", 768, 12, 12),
    "gptj-tiny": Shape("gptj", 32, 3, 2),
    "gptj-narrow": Shape("gptj", 128, 28, 4),
    "gptj-6b": Shape("gptj", 4096, 28, 16),
}
"""The demo's reward model is of the shape "demo"; with 8192 tokens "peers" has 13.7 million parameters."""

NEVER_SAMPLED = (0, 1)
"""EOS and padding of `build_tokenizer`."""


def quiet() -> None:
    """Keep the libraries' notes out of the tables."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Options that say which texts there are."""
    parser.add_argument("--data", help="data folder (train.jsonl[.gz], test.jsonl[.gz]; default: the demo's texts)")
    parser.add_argument("--vocabulary", type=int, help="tokens of the tokenizer (default: 8192; 1024 for the demo)")


def read_data(data: str | None, vocabulary: int | None, positions: int) -> tuple[list[Preference], Any]:
    """The training rows, and a tokenizer made of them."""
    preferences = load_source(check({"data": {"source": data or "demo"}}))["train"]
    return preferences, tokenizer_of(preferences, vocabulary or (8192 if data else 1024), positions)


def tokenizer_of(preferences: Sequence[Preference], size: int, positions: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the rows' texts."""
    return build_tokenizer([row.prompt + row.chosen for row in preferences], size, positions)


def random_model(
    auto: Any, config: Any, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> transformers.PreTrainedModel:
    """Random weights of a configuration, made on the device."""
    torch.manual_seed(seed)
    with torch.device(device):
        return auto.from_config(config, dtype=dtype)  # type: ignore[no-any-return]


def save_policy(folder: Path, shape: Shape, tokenizer: Any, vocabulary: int, positions: int, **where: Any) -> None:
    """Write a random policy whose answers all have the full length: it never says `NEVER_SAMPLED`.

    The last norm's bias is 1 and its gain is 1, so that what it gives adds up to the width, and the two ids have the
    same weight everywhere in the head: their logits are -100 behind every text.
    """
    model = random_model(transformers.AutoModelForCausalLM, shape.config(vocabulary, positions), **where)
    norm = model.base_model.ln_f if shape.kind == "gptj" else model.base_model.final_layer_norm
    with torch.no_grad():
        norm.bias.fill_(1.0)
        model.get_output_embeddings().weight[list(NEVER_SAMPLED)] = -100.0 / shape.width
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_reward_model(
    folder: Path, shape: Shape, tokenizer: Any, vocabulary: int, positions: int, **where: Any
) -> None:
    """Write a random reward model."""
    config = shape.config(vocabulary, positions)
    config.num_labels = 1
    random_model(transformers.AutoModelForSequenceClassification, config, seed=1, **where).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def make_run(
    root: Path,
    policy: Path,
    reward: Path,
    rows: Sequence[Preference],
    settings: Mapping[str, Any],
    overrides: Sequence[str] = (),
) -> tuple[RunDir, Config]:
    """A run that trains the model in `policy` on the prompts of `rows`, by PPO and without a tracker."""
    tree: dict[str, Any] = {
        "all": ["prefetch", "train"],
        "model": {"path": str(policy)},
        "sft": {"max_length": 16},  # no part of this; the default could be more than the model has
        "reward_model": {"checkpoint": str(reward), "max_length": 16},
        "train": {"tracker": "none", "eval_prompts": 2, "eval_interval": 10**6, "checkpoint_interval": 10**6},
        "ppo": {"delta_reward": False},
        "generate": {"stop_sequences": []},
    }
    config, run = resolve(merge(tree, settings), overrides), RunDir(root)
    atomic.write_text(run.config, dump(config))
    data = root / "stages/prefetch/out/data"
    for split, some in (("train", rows), ("test", rows[:2])):
        write_jsonl(data / f"{split}.jsonl", some)
    record(run, "prefetch", "data", data)
    return run, config


def record(run: RunDir, stage: str, name: str, path: Path, **values: Any) -> None:
    """Note a stage as done, with one artifact."""
    artifact = Artifact(os.path.relpath(path, run.root), "0" * 64, 0)
    run.write_outputs(Outputs(stage, "-", 1, {name: artifact}, values))


@contextlib.contextmanager
def training(run: RunDir, config: Config) -> Iterator[Trainer]:
    """The trainer of `pipeline.training.ppo`, put together in this process."""
    accelerator = ppo.start_accelerator(run, config)
    ranks = Ranks(accelerator.process_index, accelerator.num_processes, accelerator.device)
    progress = Progress(run.root / "progress", config.train.total_steps)
    handler = signal.getsignal(signal.SIGTERM)
    stop = StopRequest(run.stop_flag)
    signal.signal(signal.SIGTERM, handler)  # a benchmark that is told to end does not save first
    with contextlib.closing(RewardSource(run, config, run.checkpoints / "benchmark" / LEDGER, ranks)) as rewards:
        trainer, _ = ppo.assemble(run, config, accelerator, ranks, progress, stop, "benchmark", rewards)
        yield trainer


def phases_of(trainer: Trainer, **changed: Any) -> Phases:
    """What runs the trainer's phases, with some of its parts changed."""
    parts = {**vars(trainer), "folder": trainer.checkpoints.folder, **changed}
    return Phases(**{part.name: parts[part.name] for part in dataclasses.fields(Phases)})


def one_phase(phases: Phases, state: TrainState) -> tuple[TrainState, Row]:
    """The next iteration: the state behind it, and what the trainer records of it."""
    phase = phases.begin(state)
    assert phase is not None, "nobody asked it to stop"
    phases.advance(phase, lambda _step: False)
    return phases.finish(phase)


def alternate(sides: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[Any]]:
    """What each side returned, round by round; the first `warm_up` rounds are left out."""
    results: dict[str, list[Any]] = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        for name, side in sides.items():
            result = side()
            if number >= warm_up:
                results[name].append(result)
    return results


def seconds(work: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """Wall seconds of `work`, with all that it started on a GPU."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: str | torch.device) -> None:
    """Wait for a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def matmul_flops(device: str | torch.device, dtype: torch.dtype, times: int = 12) -> float:
    """Operations a second of the best of several large matrix products."""
    size = 8192 if torch.device(device).type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(times))


def copy_bandwidth(device: str | torch.device, times: int = 12) -> float:
    """Bytes a second that the best of several large copies reads and writes."""
    size = 2**30 if torch.device(device).type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(seconds(lambda: target.copy_(source), device) for _ in range(times))


def weights_of(auto: Any, config: Any) -> int:
    """A model's parameters but for the embeddings of its input, which are looked up and not multiplied."""
    model = random_model(auto, config, device="meta")
    return sum(weight.numel() for weight in model.parameters()) - model.get_input_embeddings().weight.numel()


def forward_flops(weights: int, layers: int, width: int, lengths: Sequence[int]) -> float:
    """Operations that sequences' own tokens need: two a weight and token, and causal attention."""
    return float(2 * weights * sum(lengths) + 2 * layers * width * sum(length**2 for length in lengths))


def machine(device: str | torch.device = "cpu") -> str:
    """The hardware in a few words, and how busy it is with other work."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    busy = f"; load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return f"{os.cpu_count()} CPUs, {torch.get_num_threads()} thread(s), torch {torch.__version__}{busy}"


Figure = tuple[str, Sequence[float], str]
"""A name, a value a round, and the aim."""


def print_figures(figures: Sequence[Figure]) -> None:
    """Median and range of each figure beside its aim."""
    print(f"\n{'figure':<44}{'median':>11}{'min':>11}{'max':>11}   aim")
    for name, values, aim in figures:
        print(f"{name:<44}{statistics.median(values):>11.3f}{min(values):>11.3f}{max(values):>11.3f}   {aim}".rstrip())


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need to be; the first is to the left."""
    widths = [max(len(row[place]) for row in (titles, *rows)) for place in range(len(titles))]
    print()
    for row in (titles, *rows):
        cells = [cell.ljust(width) if not place else cell.rjust(width + 2)
                 for place, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        print("".join(cells).rstrip())


def write_json(path: Path | None, report: Mapping[str, Any]) -> None:
    """Write a report where one was asked for."""
    if path is not None:
        path.write_text(json.dumps(report, indent=1, default=float) + "\n", "utf-8")
