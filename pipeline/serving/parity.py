"""Proves that a model store's rewards are the reward model's own: Hugging Face's eager forward in float32."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.config.serving import Serving
from pipeline.serving.scoring import RewardModel
from pipeline.training.models import load_reward_model


def load_reference(source: Path, device: str) -> Any:
    """The plain eager model in float32; UserError when weights are missing, superfluous or of the wrong shape."""
    return load_reward_model(source, torch.float32, attention="eager").to(device).eval()


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


def compare(
    scorer: RewardModel, sequences: Sequence[Sequence[int]], reference: Sequence[float]
) -> tuple[float, list[float]]:
    """Score in batches of 1, 2, 3 and all; return the largest difference from `reference`, and the last rewards."""
    largest = 0.0
    rewards: list[float] = []
    for size in (1, 2, 3, len(sequences)):
        scorer.max_batch_size, scorer.max_batch_tokens = size, size * max(map(len, sequences))
        rewards = scorer.score(sequences)
        differences = [abs(a - b) for a, b in zip(rewards, reference, strict=True)]
        largest = max([largest, *differences]) if all(map(math.isfinite, differences)) else math.nan
    return largest, rewards


def allowed_difference(serving: Serving, reference: Sequence[float]) -> float:
    """The tolerance in reward units: `parity_tolerance`; for 16-bit dtypes plus 16 units in the last place.

    A unit in the last place is the dtype's epsilon (2**-7 for bfloat16, 2**-10 for float16) times the largest
    reference reward, or times 1 if that is smaller: the rounding that a deep model may pile up.
    """
    if serving.dtype == "float32":
        return serving.parity_tolerance
    epsilon = float(torch.finfo(getattr(torch, serving.dtype)).eps)
    return serving.parity_tolerance + 16 * epsilon * max(1.0, *map(abs, reference))
