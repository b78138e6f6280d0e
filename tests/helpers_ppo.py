"""Tiny models, a tokenizer and a scorer without a server, for the PPO tests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from pipeline.config.load import dump, resolve
from pipeline.config.schema import Config
from pipeline.data.demo import demo_preferences
from pipeline.data.embedded import build_tokenizer
from pipeline.data.preferences import Preference
from pipeline.run import atomic
from pipeline.run.directory import Artifact, Outputs, RunDir
from pipeline.serving.usage import Traffic

VOCAB = 320
ARCHITECTURES = ("gpt_neox", "gptj", "gpt2", "llama", "qwen2")


def config_of(kind: str, layers: int = 3, hidden: int = 32) -> Any:
    """A tiny configuration of an architecture."""
    ends = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": VOCAB}
    if kind == "gpt_neox":
        return GPTNeoXConfig(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=2 * hidden,
            max_position_embeddings=128, hidden_dropout=0.0, attention_dropout=0.0, **ends,
        )  # fmt: skip
    if kind in {"gptj", "gpt2"}:
        sizes = {"n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": 128}
        dropout = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
        if kind == "gptj":
            return GPTJConfig(rotary_dim=4, **sizes, **dropout, **ends)
        return GPT2Config(**sizes, **dropout, **ends)
    cls = LlamaConfig if kind == "llama" else Qwen2Config
    return cls(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=2 * hidden, max_position_embeddings=128, **ends,
    )  # fmt: skip


def tiny_model(kind: str = "gpt_neox", seed: int = 0, spread: float = 1.0) -> Any:
    """A random causal language model; a large `spread` makes its predictions far from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(kind)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread)
    return model


@lru_cache(maxsize=1)
def preferences() -> dict[str, list[Preference]]:
    """A few demo dialogues."""
    return demo_preferences(1, 24, 8)


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of the demo dialogues."""
    texts = [row.prompt + row.chosen for row in preferences()["train"]]
    return build_tokenizer(texts, VOCAB, 128)


class HashScorer:
    """Rewards that depend on nothing but the sequence's ids; remembers its requests."""

    identity = "hash"

    def __init__(self, reward: Callable[[list[int]], float] | None = None) -> None:
        self.requests: list[list[list[int]]] = []
        self._reward = reward or _hashed

    def submit(self, sequences: Sequence[Sequence[int]]) -> Future[list[float]]:
        rows = [list(sequence) for sequence in sequences]
        self.requests.append(rows)
        future: Future[list[float]] = Future()
        future.set_result([self._reward(row) for row in rows])
        return future

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        return self.submit(sequences).result()

    def traffic(self) -> Traffic:
        """Nothing goes anywhere."""
        return Traffic()

    def close(self) -> None:
        """Nothing to close."""


def _hashed(ids: list[int]) -> float:
    return hashlib.sha256(repr(ids).encode()).digest()[0] / 128.0 - 1.0


def tiny_config(**sections: Any) -> Config:
    """A configuration of a training that takes a second."""
    tree: dict[str, Any] = {
        "preset": "test",
        "model": {"path": "embedded", "num_layers_unfrozen": 1, "embedded": {"max_positions": 128}},
        "sft": {"max_length": 96},
        "reward_model": {"max_length": 96},
        "serving": {"dtype": "float32", "max_length": 96, "max_batch_tokens": 1024, "dynamic_batching": False},
        "train": {
            "num_processes": 2, "seq_length": 72, "batch_size": 4, "total_steps": 8, "eval_interval": 4,
            "eval_prompts": 4, "checkpoint_interval": 2, "tracker": "none",
        },
        "ppo": {"num_rollouts": 4, "chunk_size": 4, "ppo_epochs": 2, "horizon": 100},
        "generate": {"max_new_tokens": 12},
        "optimizer": {"lr": 1e-3},
        "evaluate": {"num_prompts": 4, "batch_size": 4, "num_samples": 2},
        **sections,
    }  # fmt: skip
    return resolve(tree)


def make_run(root: Path, config: Config) -> RunDir:
    """A run directory whose prefetch, SFT and reward-model stages are done, with random models."""
    run = RunDir(root)
    atomic.write_text(run.config, dump(config))
    data = root / "stages/prefetch/out/data"
    for split, rows in preferences().items():
        atomic.write_text(data / f"{split}.jsonl", "".join(json_line(row) for row in rows))
    sft, reward = root / "stages/sft/out/model", root / "stages/reward-model/out/model"
    tiny_model(spread=2.0).save_pretrained(sft)
    torch.manual_seed(1)
    scorer_config = config_of("gpt_neox")
    scorer_config.num_labels, scorer_config.pad_token_id = 1, 1
    GPTNeoXForSequenceClassification(scorer_config).save_pretrained(reward)
    for folder in (sft, reward):
        tokenizer().save_pretrained(folder)
    for stage, name, path in (("prefetch", "data", data), ("sft", "model", sft), ("reward-model", "model", reward)):
        finish_stage(run, stage, name, path)
    return run


def finish_stage(run: RunDir, stage: str, name: str, path: Path) -> None:
    """Record a stage as done, with one artifact."""
    artifact = Artifact(str(path.relative_to(run.root)), "0", 0)
    run.write_outputs(Outputs(stage, "f", 1, {name: artifact}, {"accuracy": 0.9} if stage == "reward-model" else {}))


def json_line(row: Preference) -> str:
    """A row as prefetch writes it."""
    import json

    return json.dumps({"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}) + "\n"
