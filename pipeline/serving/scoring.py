"""Scores token sequences with a reward model. The server and the in-process scorer run this very file.

Self-contained on purpose (torch and transformers only): conversion copies it and cuts.py verbatim into the Triton model
store, beside model.py, so that a reward has one definition: the score head at a sequence's last token.

The sequences of a forward stand one behind the other in a single row, each with its own positions, and attention keeps
them apart: nothing is padded. Models that cannot be run that way get padded batches of sequences of similar length.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if __package__:
    from pipeline.serving.cuts import MAX_PADDING, fill, pack
else:  # in a model store: the copy beside this file
    from cuts import MAX_PADDING, fill, pack  # type: ignore[import-not-found,no-redef]

CODE_VERSION = 2
"""Part of a model store's identity: raise it when the same weights would give other rewards."""
PACKABLE = ("gpt2", "gpt_neox", "gptj", "llama", "mistral", "opt", "qwen2", "qwen3")
"""Model types of which nothing but attention looks from one token to another, and positions can be given."""

PACKED = "hh_packed"
"""The name of `packed_attention` among transformers' implementations."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Layout:
    """How the sequences of the forward under way stand one behind the other."""

    lengths: list[int]
    """Equal lengths stand together: they are computed as one."""
    bounds: torch.Tensor | None
    """For FlashAttention: where each sequence begins, and the end, int32 on the device."""


_LAYOUT: ContextVar[_Layout] = ContextVar("layout")
"""A variable of the context, since not every architecture hands arguments down to its attention."""


@contextmanager
def laid_out(lengths: Sequence[int], bounds: torch.Tensor | None = None) -> Iterator[None]:
    """`packed_attention` inside finds sequences of these lengths in its row; `bounds` as in `_Layout`."""
    token = _LAYOUT.set(_Layout(list(lengths), bounds))
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def packed_attention(
    module: torch.nn.Module | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence. query (1, H, N, D), key and value (1, G, N, D); returns (1, N, H, D)."""
    layout = _LAYOUT.get()
    if layout.bounds is not None:
        from flash_attn import flash_attn_varlen_func

        longest = max(layout.lengths)
        output = flash_attn_varlen_func(
            *(tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)),  # (N, heads, D)
            layout.bounds,
            layout.bounds,
            longest,
            longest,
            softmax_scale=scaling,
            causal=True,
            window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        )
        return output.unsqueeze(0), None
    if key.shape[1] != query.shape[1]:  # several heads share a key
        key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
    runs = [(length, len(list(group))) for length, group in groupby(layout.lengths)]
    # Cut by one operation: as many slices would each leave a gradient as large as the whole.
    sizes = [length * count for length, count in runs]
    pieces = [torch.split(tensor[0], sizes, dim=1) for tensor in (query, key, value)]
    outputs = []
    for (length, count), *parts in zip(runs, *pieces, strict=True):
        q, k, v = (
            part.reshape(len(part), count, length, -1).transpose(0, 1) for part in parts
        )  # (count, H, length, D)
        mask = _window_mask(length, sliding_window, query.device)
        output = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # (count * length, H, D)
    return torch.cat(outputs).unsqueeze(0), None


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """What a token may look at where that is not all before it: True (length, length); None without a window."""
    if window is None or length <= window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def gptj_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, None]:
    """`packed_attention` in the place of GPT-J's own, which has no choice of implementations."""
    return packed_attention(None, query, key, value)[0].transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)


class RewardModel:
    """A one-label sequence classification model (GPT-NeoX, GPT-J, GPT-2, Llama, Qwen2, ...) in evaluation mode.

    Causal attention never looks to the right, so no token is special, and padding on the right needs no mask:
    the hidden state at a sequence's last position is what it would be if the sequence were alone.
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
        attention: str = "auto",
    ) -> None:
        """Load `folder` (Hugging Face format). `dtype`: a torch dtype or its name. Raises ValueError if unsuitable.

        `attention` on a GPU is "flash_attention_2" (the package flash_attn), "sdpa" (torch's own), or "auto": the
        first where package, GPU and dtype allow. On a CPU it is torch's own.
        """
        torch_dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.device = torch.device(device)
        self.flash = _choose_flash(attention, self.device, torch_dtype)
        self.packed = AutoConfig.from_pretrained(str(folder), local_files_only=True).model_type in PACKABLE
        options = {"attn_implementation": "flash_attention_2"} if self.flash and not self.packed else {}
        model = AutoModelForSequenceClassification.from_pretrained(
            str(folder), dtype=torch_dtype, local_files_only=True, **options
        )
        head = getattr(model, "score", None)
        if not isinstance(head, torch.nn.Linear) or head.out_features != 1:
            raise ValueError(f"{folder}: {type(model).__name__} has no one-label `score` head")
        if self.packed:
            _pack_attention(model)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.max_length = max_length
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_size = max_batch_size
        self.max_padding = MAX_PADDING
        self.vocab_size: int = model.get_input_embeddings().num_embeddings
        self.tokens = self.computed = 0
        """Tokens scored so far, and with padding: tokens that were computed for it."""

    def warm_up(self) -> None:
        """Run what later requests will run, so that none of them pays for it, largest first.

        On a GPU a full batch of each length that is a power of two: the allocator takes its largest blocks before
        smaller ones can split them, and if memory is short the budget is lowered before the first request. A CPU has
        no such cost and would be busy for minutes with a large model: one token loads what is loaded on first use.
        """
        length = min(self.max_length or self.max_batch_tokens, self.max_batch_tokens)
        while self.device.type != "cpu" and length > 1:
            rows = min(self.max_batch_size, self.max_batch_tokens // length)
            self.score([[0] * length] * rows)
            length //= 2
        self.score([[0]])
        self.tokens = self.computed = 0

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
        for batch in self._batches([len(sequence) for sequence in sequences]):
            values = self._forward_or_halve([sequences[index] for index in batch])
            for index, value in zip(batch, values, strict=True):
                rewards[index] = value
        return rewards

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        if self.packed:
            return fill(lengths, self.max_batch_tokens, self.max_batch_size)
        return pack(lengths, self.max_batch_tokens, self.max_batch_size, self.max_padding)

    def _forward_or_halve(self, rows: Sequence[Sequence[int]]) -> list[float]:
        try:
            return self._forward(rows)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        # Outside the handler: the exception's traceback would keep the failed forward's activations alive.
        torch.cuda.empty_cache()
        lengths = [len(row) for row in rows]
        tokens = sum(lengths) if self.packed else len(rows) * max(lengths)
        self.max_batch_tokens = max(*lengths, min(self.max_batch_tokens, tokens // 2))
        logger.warning("out of memory: forwards now hold at most %d tokens", self.max_batch_tokens)
        half = (len(rows) + 1) // 2
        return self._forward_or_halve(rows[:half]) + self._forward_or_halve(rows[half:])

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Sequence[int]]) -> list[float]:
        at_last = self._packed_states(rows) if self.packed else self._padded_states(rows)  # (B, D)
        values: list[float] = self.model.score(at_last).squeeze(-1).float().tolist()  # (B,)
        lengths = [len(row) for row in rows]
        self.tokens += sum(lengths)
        self.computed += sum(lengths) if self.packed else len(rows) * max(lengths)
        return values

    def _packed_states(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """The hidden states at the rows' last tokens, of rows that stand one behind the other."""
        lengths = [len(row) for row in rows]
        counted = torch.tensor(lengths)
        ids = torch.tensor([token for row in rows for token in row], device=self.device)  # (N,)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self.device)  # (N,)
        bounds = torch.cat([torch.zeros(1, dtype=torch.long), counted.cumsum(0)]).to(self.device)  # (B + 1,)
        with laid_out(lengths, bounds.int() if self.flash else None):
            hidden: torch.Tensor = self.model.base_model(
                input_ids=ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False
            ).last_hidden_state  # (1, N, D)
        return hidden[0, bounds[1:] - 1]

    def _padded_states(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """The hidden states at the rows' last tokens, of rows that are padded to the longest."""
        width = max(len(row) for row in rows)
        padded = [[*row, *([0] * (width - len(row)))] for row in rows]  # what the padding holds makes no difference
        input_ids = torch.tensor(padded, dtype=torch.long, device=self.device)  # (B, T)
        last = torch.tensor([len(row) - 1 for row in rows], device=self.device)  # (B,)
        hidden: torch.Tensor = self.model.base_model(
            input_ids=input_ids, use_cache=False
        ).last_hidden_state  # (B, T, D)
        return hidden[torch.arange(len(rows), device=self.device), last]


def _pack_attention(model: Any) -> None:
    """Make a model's attention `packed_attention`."""
    if model.config.model_type == "gptj":
        for block in model.base_model.h:
            block.attn._attn = gptj_attention
    model.config._attn_implementation = PACKED


def _choose_flash(attention: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether FlashAttention computes the attention; ValueError when a GPU must use it, but cannot."""
    if device.type != "cuda" or attention == "sdpa":
        return False
    lacks = []
    if importlib.util.find_spec("flash_attn") is None:
        lacks.append("the package flash_attn")
    if torch.cuda.get_device_capability(device) < (8, 0):
        lacks.append("a GPU of compute capability 8.0 or more")
    if dtype not in (torch.bfloat16, torch.float16):
        lacks.append("a dtype of 16 bits")
    if attention == "flash_attention_2" and lacks:
        raise ValueError(f"serving.attention: flash_attention_2 needs {' and '.join(lacks)}; use auto")
    return not lacks
