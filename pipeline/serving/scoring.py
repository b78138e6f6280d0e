"""Scores token sequences with a reward model. The server and the in-process scorer run this very file.

Self-contained on purpose (torch and transformers only): conversion copies it verbatim into the Triton model store,
beside model.py, so that a reward has one definition: the score head at a sequence's last token.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

CODE_VERSION = 1
"""Part of a model store's identity: raise it when the same weights would give other rewards."""

logger = logging.getLogger(__name__)


def pack(lengths: Sequence[int], max_tokens: int, max_rows: int) -> list[list[int]]:
    """Group sequences into micro-batches of at most `max_rows` rows and `max_tokens` padded tokens.

    Longest first: each batch is as wide as its first row, so little is padding, and the batch that needs the most
    memory comes first. A sequence longer than `max_tokens` gets a batch of its own. Depends on `lengths` alone.
    Returns the batches as lists of indices into `lengths`; ties keep their order.
    """
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = not batches or len(batches[-1]) >= max_rows or (len(batches[-1]) + 1) * width > max_tokens
        if full:
            batches.append([])
            width = lengths[index]
        batches[-1].append(index)
    return batches


class RewardModel:
    """A one-label sequence classification model (GPT-NeoX, GPT-J, GPT-2, Llama, Qwen2, ...) in evaluation mode.

    Causal attention never looks to the right, so with right padding no mask is needed and no token is special:
    the hidden state at position length - 1 is what the unpadded sequence would have there.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        *,
        max_length: int | None = None,
        max_batch_tokens: int = 8192,
        max_batch_size: int = 64,
    ) -> None:
        """Load `folder` (Hugging Face format). `dtype`: a torch dtype or its name. Raises ValueError if unsuitable."""
        torch_dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        model = AutoModelForSequenceClassification.from_pretrained(
            str(folder), dtype=torch_dtype, local_files_only=True
        )
        head = getattr(model, "score", None)
        if not isinstance(head, torch.nn.Linear) or head.out_features != 1:
            raise ValueError(f"{folder}: {type(model).__name__} has no one-label `score` head")
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.max_length = max_length
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_size = max_batch_size
        self.vocab_size: int = model.get_input_embeddings().num_embeddings

    def validate(self, sequences: Sequence[Sequence[int]]) -> None:
        """Raise ValueError for a sequence that has no reward: empty, too long, or with ids outside the vocabulary.

        Checked before the device sees it, since an id out of range would kill a CUDA context.
        """
        for index, sequence in enumerate(sequences):
            if len(sequence) == 0:
                raise ValueError(f"sequence {index} is empty")
            if self.max_length is not None and len(sequence) > self.max_length:
                raise ValueError(f"sequence {index} has {len(sequence)} tokens, more than {self.max_length}")
            if min(sequence) < 0 or max(sequence) >= self.vocab_size:
                raise ValueError(f"sequence {index} has a token id outside 0..{self.vocab_size - 1}")

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Return the reward of each token sequence, in order, as float32 values. May hold NaN or inf: callers check."""
        self.validate(sequences)
        rewards = [0.0] * len(sequences)
        for batch in pack([len(sequence) for sequence in sequences], self.max_batch_tokens, self.max_batch_size):
            values = self._forward_or_halve([sequences[index] for index in batch])
            for index, value in zip(batch, values, strict=True):
                rewards[index] = value
        return rewards

    def _forward_or_halve(self, rows: Sequence[Sequence[int]]) -> list[float]:
        try:
            return self._forward(rows)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        # Outside the handler: the exception's traceback would keep the failed forward's activations alive.
        torch.cuda.empty_cache()
        width = max(len(row) for row in rows)
        self.max_batch_tokens = max(width, len(rows) * width // 2)
        logger.warning("out of memory: batches now hold at most %d tokens", self.max_batch_tokens)
        half = (len(rows) + 1) // 2
        return self._forward_or_halve(rows[:half]) + self._forward_or_halve(rows[half:])

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Sequence[int]]) -> list[float]:
        width = max(len(row) for row in rows)
        padded = [[*row, *([0] * (width - len(row)))] for row in rows]  # what the padding holds makes no difference
        input_ids = torch.tensor(padded, dtype=torch.long, device=self.device)  # (B, T)
        last = torch.tensor([len(row) - 1 for row in rows], device=self.device)  # (B,)
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, D)
        at_last = hidden[torch.arange(len(rows), device=self.device), last]  # (B, D)
        values: list[float] = self.model.score(at_last).squeeze(-1).float().tolist()  # (B,)
        return values
