"""What the benchmarks share: options, models made on the spot, and a run to train in. How they measure: _figures.py."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
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
from pipeline.data.tokens import encode
from pipeline.run import atomic
from pipeline.run.directory import Artifact, Outputs, RunDir
from pipeline.run.work import Progress
from pipeline.serving.usage import Traffic
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
    "gptj-narrow": Shape("gptj", 256, 28, 4),
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


DRAWN = 7
"""The seed of `prompts_of`."""
OPTIONS = {
    "shape": "the model's",
    "reward_shape": "the reward model's",
    "unfrozen": "layers that are trained",
    "rounds": "rounds, after one that does not count",
    "rollouts": "prompts of an iteration",
    "new_tokens": "tokens of an answer",
    "seq_length": "tokens of the longest dialogue",
    "batch_size": "rollouts of an optimiser step",
    "epochs": "epochs of an iteration",
    "threads": "CPU threads",
}
"""What the options say that most benchmarks have."""


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark whose docstring this is."""
    return argparse.ArgumentParser(description=(description or "").splitlines()[0])


def add_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Some of OPTIONS with their defaults; (default, meaning) where it says something else here."""
    for name, given in defaults.items():
        default, meaning = given if isinstance(given, tuple) else (given, OPTIONS[name])
        kind: dict[str, Any] = {"choices": SHAPES} if name.endswith("shape") else {"type": type(default)}
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, default=default, help=f"{meaning} (default: {default})", **kind)


def add_data_options(parser: argparse.ArgumentParser, vocabulary: str = "8192; 1024 for the demo") -> None:
    """Options that say which texts there are."""
    parser.add_argument("--data", help="data folder (train.jsonl[.gz], test.jsonl[.gz]; default: the demo's texts)")
    parser.add_argument("--vocabulary", type=int, help=f"tokens of the tokenizer (default: {vocabulary})")


def read_data(data: str | None, vocabulary: int | None, positions: int) -> tuple[list[Preference], Any]:
    """The training rows, and a tokenizer made of them."""
    preferences = load_source(check({"data": {"source": data or "demo"}}))["train"]
    return preferences, tokenizer_of(preferences, vocabulary or (8192 if data else 1024), positions)


def prompts_of(
    preferences: Sequence[Preference], tokenizer: PreTrainedTokenizerFast, room: int, count: int
) -> tuple[list[Preference], list[list[int]]]:
    """Rows drawn from all, the same each time, among those whose prompts need not be cut; and their prompts' ids."""
    order = torch.randperm(len(preferences), generator=torch.Generator().manual_seed(DRAWN)).tolist()
    drawn = [(preferences[place], encode(tokenizer, preferences[place].prompt)) for place in order]
    kept = [(row, ids) for row, ids in drawn if len(ids) <= room][:count]
    return [row for row, _ in kept], [ids for _, ids in kept]


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


def save_models(
    root: Path, shape: str, reward_shape: str, tokenizer: Any, vocabulary: int, length: int, **where: Any
) -> None:
    """Write root/policy and root/reward, for dialogues of `length` tokens and an EOS that is put behind an answer."""
    sizes = (tokenizer, vocabulary, length + 1)
    save_policy(root / "policy", SHAPES[shape], *sizes, **where)
    save_reward_model(root / "reward", SHAPES[reward_shape], *sizes, **where)


def settings_of(
    length: int, new_tokens: int, rollouts: int, batch_size: int, *more: Mapping[str, Any], dtype: str = "float32"
) -> dict[str, Any]:
    """Settings of a training of one phase's size, with others laid on them."""
    settings: dict[str, Any] = {
        "train": {"seq_length": length, "batch_size": batch_size},
        "ppo": {"num_rollouts": rollouts, "chunk_size": rollouts},
        "generate": {"max_new_tokens": new_tokens},
        "serving": {"dtype": dtype, "max_length": length + 1},
    }
    for each in more:
        settings = merge(settings, each)
    return settings


@contextlib.contextmanager
def workplace(inside: Path | None = None) -> Iterator[Path]:
    """A folder for models and runs that goes with the benchmark."""
    with tempfile.TemporaryDirectory(prefix="hh-benchmark-", dir=inside) as folder:
        yield Path(folder)


class InstantScorer:
    """A `Scorer` that nobody waits for: rewards by a function of the ids."""

    identity = None

    def __init__(self, reward: Callable[[Sequence[int]], float]) -> None:
        self._reward = reward

    def submit(self, sequences: Sequence[Sequence[int]]) -> Future[list[float]]:
        """Done at once."""
        future: Future[list[float]] = Future()
        future.set_result(self.score(sequences))
        return future

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The function's."""
        return [self._reward(sequence) for sequence in sequences]

    def traffic(self) -> Traffic:
        """Nothing goes anywhere."""
        return Traffic()

    def close(self) -> None:
        """Nothing to close."""


def make_run(
    root: Path,
    models: Path,
    rows: Sequence[Preference],
    settings: Mapping[str, Any],
    overrides: Sequence[str] = (),
) -> tuple[RunDir, Config]:
    """A run that trains the policy of `save_models` on the prompts of `rows`, by PPO and without a tracker."""
    tree: dict[str, Any] = {
        "all": ["prefetch", "train"],
        "model": {"path": str(models / "policy")},
        "sft": {"max_length": 16},  # no part of this; the default could be more than the model has
        "reward_model": {"checkpoint": str(models / "reward"), "max_length": 16},
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


def weights_of(auto: Any, config: Any) -> int:
    """A model's parameters but for the embeddings of its input, which are looked up and not multiplied."""
    model = random_model(auto, config, device="meta")
    return sum(weight.numel() for weight in model.parameters()) - model.get_input_embeddings().weight.numel()


def forward_flops(weights: int, layers: int, width: int, lengths: Sequence[int]) -> float:
    """Operations that sequences' own tokens need: two a weight and token, and causal attention."""
    return float(2 * weights * sum(lengths) + 2 * layers * width * sum(length**2 for length in lengths))
