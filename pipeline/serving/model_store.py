"""Writes a Triton model repository that serves one reward model, and describes it in a manifest.

model_store/
  manifest.json                identity, source, parity figures, known answers
  <name>/config.pbtxt
  <name>/1/reward_model/       the Hugging Face folder, safetensors in the served dtype
  with the flavour python:
  <name>/1/model.py            the Python backend's entry, from model_store_templates/
  <name>/1/scoring.py          pipeline/serving/scoring.py, verbatim, and cuts.py
  with the flavour torchscript:
  <name>/1/model.pt            the graph; scoring in process takes reward_model/
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Any

from pipeline.config.schema import Config
from pipeline.config.serving import Serving
from pipeline.errors import UserError
from pipeline.resources import resource_dir
from pipeline.run import atomic, reward_models
from pipeline.run.directory import RunDir
from pipeline.run.hashing import fingerprint, sha256_file
from pipeline.run.sources import reward_model_path
from pipeline.serving import access

MANIFEST = "manifest.json"
VERSION = "1"
MODEL_FOLDER = "reward_model"

_EPSILON = {"float32": 0.0, "float16": 2.0**-10}
_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
TOKENIZER_FILES = (
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
    max_batch_tokens: int
    """That one request may hold, and `max_batch_size` sequences."""
    max_batch_size: int
    code_version: int
    versions: dict[str, str]
    parity: dict[str, float]
    """"max_difference", at "worst_length" in a batch of "worst_batch", "mean_difference" and "allowed" (reward units);
    "sequences" compared."""
    known_answers: list[KnownAnswer]
    answer_tolerance: float
    """How far a healthy server may be from a known answer."""
    flavour: str = "python"
    graph: dict[str, Any] | None = None
    """What a TorchScript graph needs of the libtorch that loads it."""


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


def serving_of(manifest: Manifest) -> dict[str, Any]:
    """The settings of `serving` that are a store's own: what its server takes, and how requests are cut for it."""
    names = ("flavour", "dtype", "max_length", "max_batch_tokens", "max_batch_size")
    return {name: getattr(manifest, name) for name in names}


def allowed_difference(parity_tolerance: float, dtype: str, rewards: Sequence[float]) -> float:
    """How far rewards in `dtype` may be from `rewards`: the tolerance; in 16 bits plus 16 units in the last place.

    A unit in the last place is the dtype's epsilon (2**-7 for bfloat16, 2**-10 for float16) times the largest reward,
    or times 1 if that is smaller: the rounding that a deep model may pile up. An unknown dtype counts as bfloat16.
    """
    return parity_tolerance + 16 * _EPSILON.get(dtype, 2.0**-7) * max(1.0, *map(abs, rewards))


def write_manifest(store: Path, manifest: Manifest) -> None:
    """Write the manifest, the last file of a store."""
    atomic.write_json(store / MANIFEST, asdict(manifest))


def model_folder(store: Path, name: str) -> Path:
    """The Hugging Face folder inside a store."""
    return store / name / VERSION / MODEL_FOLDER


def reward_folder(run: RunDir, config: Config, identity: str | None = None) -> Path:
    """The run's reward model as a Hugging Face folder: in the store where it is converted, else where it comes from.

    `identity` is that of the model which the run is to use by now, if it is not the converted one.
    """
    if identity is not None or run.outputs("convert") is not None:
        store = reward_models.store_of(run, identity)
        access.check(store)
        return model_folder(store, read_manifest(store).model_name)
    folder = reward_model_path(run, config)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: has no config.json, so it must be converted first; run --stage convert")
    return folder


def model_name(serving: Serving, checkpoint: str | None) -> str:
    """`serving.model_name`, or the checkpoint's last path component, or "reward-model"."""
    if serving.model_name is not None:
        return serving.model_name
    last = Path(checkpoint).name if checkpoint else ""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("._-")
    return name or "reward-model"


def render_config(serving: Serving, name: str, identity: str) -> str:
    """The model's config.pbtxt."""
    template = Template((resource_dir("model_store_templates") / serving.flavour / "config.pbtxt").read_text("utf-8"))
    # Without a queue policy on purpose: any of its options makes this server's batcher sleep between batches.
    # Nor does it wait for company: while the model is busy, requests gather by themselves.
    batching = "dynamic_batching { max_queue_delay_microseconds: 0 }" if serving.dynamic_batching else ""
    text = template.substitute(
        name=name,
        identity=identity,
        max_batch_size=serving.max_batch_size,
        # Requests of different widths may meet in one execution; model.py packs their rows itself.
        ragged=" allow_ragged_batch: true" if serving.dynamic_batching else "",
        dynamic_batching=batching,
        warm_up=",\n".join(_warm_up_sample(*shape) for shape in warm_up_shapes(serving)),
        dtype=serving.dtype,
        attention=serving.attention,
        max_length=serving.max_length,
        max_batch_tokens=serving.max_batch_tokens,
        num_threads=serving.num_threads,
        **package_versions(),
    )
    parse_config(text)
    return text


def parse_config(text: str) -> Any:
    """A config.pbtxt as Triton's own ModelConfig message; UserError for what Triton would not read."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        return text_format.Parse(text, ModelConfig())
    except text_format.ParseError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"config.pbtxt: Triton does not read it ({reason}); mend model_store_templates") from error


def warm_up_shapes(serving: Serving) -> list[tuple[int, int]]:
    """Full batches (rows, length) of each length that is half of the one before, longest first."""
    longest = min(serving.max_length, serving.max_batch_tokens)
    lengths = [longest >> shift for shift in range(longest.bit_length())]
    return [(min(serving.max_batch_size, serving.max_batch_tokens // length), length) for length in lengths]


def _warm_up_sample(rows: int, length: int) -> str:
    inputs = {"input_ids": length, "lengths": 1}
    values = " ".join(
        f'inputs {{ key: "{name}" value {{ data_type: TYPE_INT32 dims: [ {size} ] zero_data: true }} }}'
        for name, size in inputs.items()
    )
    return f'  {{ name: "{rows}x{length}" batch_size: {rows} {values} }}'


def package_versions() -> dict[str, str]:
    """The versions that the rewards were checked with."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}


def write_config(store: Path, name: str, text: str) -> None:
    """Write config.pbtxt."""
    atomic.write_text(store / name / "config.pbtxt", text)


def write_code(store: Path, name: str) -> None:
    """Write model.py and what it imports, which serve the flavour python."""
    version = store / name / VERSION
    model_py = resource_dir("model_store_templates") / "python" / "model.py"
    atomic.write_bytes(version / "model.py", model_py.read_bytes())
    for file in ("scoring.py", "cuts.py"):
        atomic.write_bytes(version / file, Path(__file__).with_name(file).read_bytes())


def place_model(source: Path, target: Path, dtype: str) -> None:
    """Put the model of folder `source` into `target`, as safetensors in `dtype`, with its tokenizer.

    Files that already are what is wanted are hard-linked (copied across file systems); others are written anew.
    """
    target.mkdir(parents=True, exist_ok=True)
    with atomic.disk_errors(target):
        if stored_dtypes(source) == {_SAFETENSORS_DTYPES[dtype]}:
            for file in [*source.glob("*.safetensors"), *source.glob("*.safetensors.index.json")]:
                _link_or_copy(file.resolve(), target / file.name)
            shutil.copyfile(source / "config.json", target / "config.json")
        else:
            _convert(source, target, dtype)
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)


def stored_dtypes(folder: Path) -> set[str]:
    """The dtypes of all tensors in a folder's safetensors files; empty without such files."""
    return set(stored_bytes(folder))


def stored_bytes(folder: Path) -> dict[str, int]:
    """How many bytes a folder's safetensors files hold in each dtype, from their headers."""
    sizes: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for entry in header.values():
            begin, end = entry["data_offsets"]
            sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + end - begin
    return sizes


def weights_sha256(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's safetensors files."""
    return _files_sha256(sorted(folder.glob("*.safetensors")))


def tokenizer_sha256(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's tokenizer files."""
    return _files_sha256([folder / name for name in TOKENIZER_FILES if (folder / name).is_file()])


def store_identity(folder: Path, dtype: str, code_version: int, flavour: str = "python") -> str:
    """What makes two stores give the same rewards: weights, architecture, tokenizer, dtype, code and flavour."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config.pop("transformers_version", None)
    parts = [weights_sha256(folder), config, tokenizer_sha256(folder), dtype, code_version, flavour]
    return fingerprint(parts)


def _files_sha256(files: list[Path]) -> str:
    return fingerprint([[file.name, sha256_file(file)] for file in files])


def _link_or_copy(source: Path, target: Path) -> None:
    if not source.stat().st_mode & 0o002:  # else every user could change the weights by their other name
        with contextlib.suppress(OSError):  # another file system, or one without hard links
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def _convert(source: Path, target: Path, dtype: str) -> None:
    """Write the weights anew in `dtype`, a tensor at a time."""
    import torch

    from pipeline.serving.tensors import Lazy, read_tensors, save_tensors

    wanted: torch.dtype = getattr(torch, dtype)
    tensors: dict[str, Lazy] = {}
    for path in sorted(source.glob("*.safetensors")):
        tensors |= {name: tensor.to(wanted) for name, tensor in read_tensors(path).items()}
    save_tensors(target, tensors)
    config = json.loads((source / "config.json").read_text("utf-8"))
    config.pop("torch_dtype", None)  # as older versions call it
    atomic.write_json(target / "config.json", {**config, "dtype": dtype})
