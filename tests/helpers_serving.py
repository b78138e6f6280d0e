"""Tiny random reward models, and run directories in which the stages before serving are done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from pipeline.config.load import check, dump
from pipeline.config.schema import Config
from pipeline.run.directory import Artifact, Outputs, RunDir
from pipeline.serving.convert import convert
from pipeline.serving.model_store import Manifest

VOCAB = 97
SMALL: dict[str, dict[str, Any]] = {
    "gpt_neox": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    "qwen2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    },
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
    },
    "mistral": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "sliding_window": 50,
    },
}
"""Model types and sizes; positions are 128 for all."""


def tiny_model(kind: str = "gpt_neox", *, seed: int = 0, labels: int = 1, vocab: int = VOCAB, **sizes: Any) -> Any:
    """A random sequence classifier whose rewards spread over about -2..2, in float32 and evaluation mode."""
    positions = "n_positions" if kind in ("gptj", "gpt2") else "max_position_embeddings"
    settings = {**SMALL[kind], positions: 128, **sizes}
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=vocab, num_labels=labels, pad_token_id=0, bos_token_id=0, eos_token_id=0, **settings
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the default initialisation gives almost equal rewards
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model


def tiny_tokenizer(vocab: int = VOCAB, start: int = 33) -> transformers.PreTrainedTokenizerFast:
    """Characters as tokens; `start` shifts which character has which id."""
    words = {"<pad>": 0, **{chr(start + index): index + 1 for index in range(vocab - 1)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>")


def save_reward_model(folder: Path, kind: str = "gpt_neox", **settings: Any) -> Path:
    """Write a tiny reward model with its tokenizer."""
    tiny_model(kind, **settings).save_pretrained(folder)
    tiny_tokenizer(settings.get("vocab", VOCAB)).save_pretrained(folder)
    return folder


def serving_config(**serving: Any) -> Config:
    """A configuration with small serving limits, in float32; `serving` lays over them."""
    settings = {
        "dtype": "float32",
        "max_length": 128,
        "max_batch_tokens": 1024,
        "max_batch_size": 16,
        "start_timeout_s": 120,
        "request_timeout_s": 20,
        "retry_timeout_s": 120,
        **serving,
    }
    return check({"serving": settings, "sandbox": {"engine": "venv"}})


def converted_run(root: Path, source: Path, config: Config) -> tuple[RunDir, Manifest]:
    """A run directory in which the convert stage is done for the reward model in `source`."""
    run = RunDir(root)
    root.mkdir(parents=True, exist_ok=True)
    run.config.write_text(dump(config))
    store = root / "model_store"
    manifest = convert(source, store, config.serving)
    artifacts = {"model_store": Artifact("model_store", "0" * 64, 0)}
    values = {"identity": manifest.identity, "model_name": manifest.model_name}
    run.write_outputs(Outputs("convert", "f", 1, artifacts, values))
    return run, manifest
