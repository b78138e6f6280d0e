"""Proves that a model store's rewards are the reward model's own: Hugging Face's eager forward in float32."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.serving.model_store import stored_bytes
from pipeline.serving.tensors import read_tensors
from pipeline.training.models import load_reward_model

Score = Callable[[list[list[int]]], list[float]]
"""Gives the rewards of sequences that are computed together."""

_HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}


def load_reference(source: Path, device: str) -> Any:
    """The plain eager model, computing in float32; UserError when weights are missing, superfluous or misshapen.

    Weights that are stored in 16 bits stay so in memory, see `compute_in_float32`; the others keep all their bits.
    """
    stored = {_HALVES[name]: size for name, size in stored_bytes(source).items() if name in _HALVES}
    dtype = max(stored, key=lambda half: stored[half], default=torch.float32)
    model = load_reward_model(source, dtype, attention="eager")
    if stored:
        _put_back(source, model, dtype)
    model = model.to(device).eval()
    compute_in_float32(model)
    return model


def _put_back(source: Path, model: nn.Module, dtype: torch.dtype) -> None:
    """Give the weights that are stored in another dtype than the model was loaded in their exact values again."""
    parameters = dict(model.named_parameters())
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in read_tensors(file).items():
            # What is no parameter is a constant of older versions, which loading has passed over.
            if tensor.dtype != dtype and name in parameters:
                kept = tensor.dtype if tensor.dtype in _HALVES.values() else torch.float32
                parameters[name].data = tensor.read().to(kept, copy=True)


def compute_in_float32(model: nn.Module) -> None:
    """Let each layer's weights be float32 while that layer runs: a model of 12 GB never takes 24.

    The same numbers as from a float32 copy of the model; afterwards each layer has its own, untouched tensors again.
    """
    for module in model.modules():
        own = {name: value for name, value in module.named_parameters(recurse=False) if value.dtype != torch.float32}
        if own:
            _widen_while_running(module, own)


def _widen_while_running(module: nn.Module, own: dict[str, nn.Parameter]) -> None:
    # Neither function holds the module: it would live on when the model is dropped, until the next garbage collection.
    def widen(layer: nn.Module, *_: Any) -> None:
        for name, value in own.items():
            layer._parameters[name] = nn.Parameter(value.float(), requires_grad=False)

    def restore(layer: nn.Module, *_: Any) -> None:
        layer._parameters.update(own)

    module.register_forward_pre_hook(widen)
    module.register_forward_hook(restore, always_call=True)


@torch.inference_mode()
def reference_reward(model: Any, sequence: Sequence[int]) -> float:
    """The pooled logit of Hugging Face's own forward for one unpadded sequence, in float32."""
    # Without a padding token the model pools the last position, whatever token stands there.
    model.config.get_text_config().pad_token_id = None
    input_ids = torch.tensor([list(sequence)], device=model.device)  # (1, T)
    return float(model(input_ids=input_ids, use_cache=False).logits[0, 0])


def probe_sequences(vocab_size: int, max_length: int) -> list[list[int]]:
    """Sequences of lengths 1, 2, odd, even and the maximum, of tokens drawn with a fixed seed."""
    draw = random.Random(20220816)
    lengths = sorted({min(length, max_length) for length in (1, 2, 3, 7, 12, 33, 65, max_length // 2 + 1, max_length)})
    return [[draw.randrange(vocab_size) for _ in range(length)] for length in lengths]


@dataclass(frozen=True)
class Differences:
    """How far rewards were from the reference, over all the ways in which sequences were put together."""

    largest: float
    """NaN where any reward is not finite."""
    mean: float
    length: int
    """Of the sequence with the largest difference."""
    batch: int
    """How many sequences it was computed with."""
    rewards: list[float]
    """Of each sequence when all are computed together."""


def compare(score: Score, sequences: Sequence[Sequence[int]], reference: Sequence[float]) -> Differences:
    """Score the sequences alone, in twos and threes, and all together in rising, falling and mixed order."""
    found: list[tuple[float, int, int]] = []
    rewards: dict[int, float] = {}
    for batch in _batches(len(sequences)):
        values = score([list(sequences[index]) for index in batch])
        rewards = dict(zip(batch, values, strict=True))
        found += [(abs(value - reference[i]), len(sequences[i]), len(batch)) for i, value in rewards.items()]
    wrong = [entry for entry in found if not math.isfinite(entry[0])]
    largest, length, batch_size = (math.nan, *wrong[0][1:]) if wrong else max(found)
    mean = math.fsum(difference for difference, _, _ in found) / len(found)
    return Differences(largest, mean, length, batch_size, [rewards[index] for index in range(len(sequences))])


def _batches(count: int) -> Iterator[list[int]]:
    """Which sequences are computed together; the last batch holds all."""
    everything = list(range(count))
    for size in (1, 2, 3):
        yield from (everything[start : start + size] for start in range(0, count, size))
    yield everything[::-1]
    yield random.Random(count).sample(everything, count)
    yield everything
