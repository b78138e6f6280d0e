"""Writes a Triton model repository that serves one reward model, and describes it in a manifest.

model_store/
  manifest.json                identity, source, parity figures, known answers
  <name>/config.pbtxt
  <name>/1/model.py            the Python backend's entry, from model_store_templates/
  <name>/1/scoring.py          pipeline/serving/scoring.py, verbatim
  <name>/1/reward_model/       the Hugging Face folder, safetensors in the served dtype
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Any

from pipeline.config.serving import Serving
from pipeline.errors import UserError
from pipeline.resources import resource_dir
from pipeline.run import atomic
from pipeline.run.hashing import fingerprint, sha256_file

MANIFEST = "manifest.json"
VERSION = "1"
MODEL_FOLDER = "reward_model"

_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
)


@dataclass(frozen=True)
class KnownAnswer:
    """A token sequence and the reward that the store's code gave it at conversion."""

    tokens: list[int]
    reward: float


@dataclass(frozen=True)
class Manifest:
    """What a model store holds, and how to know that a server serves just that."""

    identity: str
    """SHA-256 over weights, model config, tokenizer, dtype and the scoring code's version."""
    model_name: str
    source: str
    weights_sha256: str
    tokenizer_sha256: str
    dtype: str
    max_length: int
    code_version: int
    versions: dict[str, str]
    parity: dict[str, float]
    """"max_difference" and "allowed" (reward units), "sequences" compared."""
    known_answers: list[KnownAnswer]
    answer_tolerance: float
    """How far a healthy server may be from a known answer."""


def read_manifest(store: Path) -> Manifest:
    """Read a store's manifest; UserError when there is none or it is of another version."""
    path = store / MANIFEST
    raw = atomic.read_json(path)
    if raw is None:
        raise UserError(f"{path}: no such file; run the conversion again with --force --stage convert")
    try:
        answers = [KnownAnswer(**answer) for answer in raw.pop("known_answers")]
        return Manifest(known_answers=answers, **raw)
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: not of this version; run it again with --force --stage convert") from None


def write_manifest(store: Path, manifest: Manifest) -> None:
    """Write the manifest, the last file of a store."""
    atomic.write_json(store / MANIFEST, asdict(manifest))


def model_folder(store: Path, name: str) -> Path:
    """The Hugging Face folder inside a store."""
    return store / name / VERSION / MODEL_FOLDER


def model_name(serving: Serving, checkpoint: str | None) -> str:
    """`serving.model_name`, or the checkpoint's last path component, or "reward-model"."""
    if serving.model_name is not None:
        return serving.model_name
    last = Path(checkpoint).name if checkpoint else ""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("._-")
    return name or "reward-model"


def render_config(serving: Serving, name: str, identity: str) -> str:
    """The model's config.pbtxt."""
    template = Template((resource_dir("model_store_templates") / "python" / "config.pbtxt").read_text("utf-8"))
    # Without a queue policy on purpose: any of its options makes this server's batcher sleep between batches.
    # Nor does it wait for company: while the model is busy, requests gather by themselves.
    batching = "dynamic_batching { max_queue_delay_microseconds: 0 }" if serving.dynamic_batching else ""
    return template.substitute(
        name=name,
        identity=identity,
        max_batch_size=serving.max_batch_size,
        # Requests of different widths may meet in one execution; model.py packs their rows itself.
        ragged=" allow_ragged_batch: true" if serving.dynamic_batching else "",
        dynamic_batching=batching,
        dtype=serving.dtype,
        max_length=serving.max_length,
        max_batch_tokens=serving.max_batch_tokens,
        num_threads=serving.num_threads,
        **package_versions(),
    )


def package_versions() -> dict[str, str]:
    """The versions that the rewards were checked with."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}


def write_code(store: Path, name: str, config_text: str) -> None:
    """Write config.pbtxt, model.py and scoring.py."""
    version = store / name / VERSION
    model_py = resource_dir("model_store_templates") / "python" / "model.py"
    atomic.write_text(store / name / "config.pbtxt", config_text)
    atomic.write_bytes(version / "model.py", model_py.read_bytes())
    atomic.write_bytes(version / "scoring.py", Path(__file__).with_name("scoring.py").read_bytes())


def place_model(source: Path, target: Path, dtype: str) -> None:
    """Put the model of folder `source` into `target`, as safetensors in `dtype`, with its tokenizer.

    Files that already are what is wanted are hard-linked (copied across file systems); others are loaded and saved.
    """
    target.mkdir(parents=True, exist_ok=True)
    with atomic.disk_errors(target):
        if stored_dtypes(source) == {_SAFETENSORS_DTYPES[dtype]}:
            for file in [*source.glob("*.safetensors"), *source.glob("*.safetensors.index.json")]:
                _link_or_copy(file.resolve(), target / file.name)
            shutil.copyfile(source / "config.json", target / "config.json")
        else:
            _convert(source, target, dtype)
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)


def stored_dtypes(folder: Path) -> set[str]:
    """The dtypes of all tensors in a folder's safetensors files, from their headers; empty without such files."""
    dtypes: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(size))
        dtypes |= {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    return dtypes


def weights_sha256(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's safetensors files."""
    return _files_sha256(sorted(folder.glob("*.safetensors")))


def tokenizer_sha256(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's tokenizer files."""
    return _files_sha256([folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()])


def store_identity(folder: Path, dtype: str, code_version: int) -> str:
    """What makes two stores give the same rewards: weights, architecture, tokenizer, dtype and code."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config.pop("transformers_version", None)
    return fingerprint([weights_sha256(folder), config, tokenizer_sha256(folder), dtype, code_version])


def _files_sha256(files: list[Path]) -> str:
    return fingerprint([[file.name, sha256_file(file)] for file in files])


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _convert(source: Path, target: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        source, dtype=getattr(torch, dtype), local_files_only=True
    )
    model.save_pretrained(target)
