"""Weights on disk, a tensor at a time: conversion of a large model never holds more than a part of it in memory."""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from pipeline.run import atomic

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
"""What files of weights are called."""
NESTED = ("state_dict", "model_state_dict", "model", "module")
"""Entries under which training programs keep a model's weights beside other things."""
SHARD_BYTES = 4 << 30
"""A larger model is written as several files."""
_WINDOW = 1 << 28
"""Bytes that are read before a file is mapped anew: the pages of the old mapping no longer count as ours."""
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Safetensors' names of dtypes."""
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


class Unreadable(Exception):
    """A file that holds no tensors by name; its text says what it is instead."""


@dataclass(frozen=True)
class Lazy:
    """A tensor that is read when it is wanted."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    file: Path
    """Where it is, and its name there."""
    key: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> Lazy:
        """The same in another floating-point dtype; integers stay what they are."""
        if self.dtype == dtype or not self.dtype.is_floating_point:
            return self
        return Lazy(dtype, self.shape, lambda: self.read().to(dtype), self.file, self.key)


def read_tensors(path: Path) -> dict[str, Lazy]:
    """The tensors of a safetensors file or of a pickled state dict; `Unreadable` when there are none.

    Pickles are mapped, not loaded, and never run code.
    """
    opened = _Reader(path)
    return {
        name: Lazy(dtype, shape, lambda name=name: opened.read(name), path, name)  # type: ignore[misc]
        for name, (dtype, shape) in opened.entries.items()
    }


class _Reader:
    """A mapped file of tensors, mapped anew after every `_WINDOW` bytes. Old pickles are in memory, and stay there."""

    def __init__(self, path: Path) -> None:
        self._open = _map_safetensors if path.suffix == ".safetensors" else _map_pickle
        self._mapped = path.suffix == ".safetensors" or zipfile.is_zipfile(path)
        self._path = path
        self._tensors = self._open(path)
        self._bytes = 0
        self.entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        if self._mapped and self._bytes > _WINDOW:
            self._tensors, self._bytes = {}, 0
            self._tensors = self._open(self._path)
        tensor = self._tensors[name]
        self._bytes += tensor.nbytes
        return tensor


def _map_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise Unreadable(f"is not whole or not safetensors ({error})") from error


def _map_pickle(path: Path) -> dict[str, torch.Tensor]:
    """A state dict, or the first of `NESTED` that a larger dict holds; views of the mapped file."""
    try:
        # Files of before torch 1.6 are no zip archives and cannot be mapped.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # torch's reader lets through whatever a stray byte leads to
        raise Unreadable(_why(error)) from error
    if not isinstance(loaded, Mapping):
        raise Unreadable(f"holds one {type(loaded).__name__}, not tensors by name")
    for content in (loaded, *(loaded.get(name) for name in NESTED)):
        if isinstance(content, Mapping):
            found = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
            if found and all(isinstance(key, str) for key in found):
                return {key: value.detach() for key, value in found.items()}
    kind = "an optimiser's state" if "param_groups" in loaded else "a dict without tensors"
    raise Unreadable(f"holds {kind}")


def _why(error: Exception) -> str:
    """In words, why a pickle was not loaded."""
    text = str(error)
    if "TorchScript" in text:
        return "is a TorchScript program"
    if (needed := _GLOBAL.search(text)) is not None:
        return f"is a pickle that needs more than tensors ({needed[1]}), and its code is not run"
    return "is not a whole file of torch.save"


def save_tensors(folder: Path, tensors: Mapping[str, Lazy], shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model's weights under Hugging Face's names: model.safetensors, or shards with their index."""
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, {name: tensors[name] for name in names})
    if split.is_sharded:
        write_index(folder, split.tensor_to_filename, split.metadata["total_size"])


def write_index(folder: Path, file_of: Mapping[str, str], total: int) -> None:
    """The index of sharded weights."""
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
    atomic.write_json(folder / "model.safetensors.index.json", content)


def write_safetensors(path: Path, tensors: Mapping[str, Lazy]) -> None:
    """Write one safetensors file, holding one tensor at a time.

    The library's own writer wants all of a file's tensors in memory. The format: the header's length as 8 bytes,
    little-endian; the header, JSON padded with spaces to a multiple of 8; the tensors' bytes, without gaps.
    """
    # Wider elements first keeps every tensor aligned to its own.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.bytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with atomic.atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            file.write(tensor.read().contiguous().flatten().view(torch.uint8).numpy().data)
