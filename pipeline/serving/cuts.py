"""How sequences are cut into forwards and requests. Python alone: whoever asks a server needs no torch for it.

Conversion copies this file verbatim into the Triton model store, beside scoring.py.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_PADDING = 0.05
"""The largest share of padding in a forward of padded sequences."""


def pack(lengths: Sequence[int], max_tokens: int, max_rows: int, max_padding: float = 1.0) -> list[list[int]]:
    """Group sequences into micro-batches of at most `max_rows` rows and `max_tokens` padded tokens.

    Longest first: each batch is as wide as its first row, so little is padding, and the batch that needs the most
    memory comes first; padding is at most the share `max_padding` of its tokens. A sequence longer than `max_tokens`
    gets a batch of its own. Depends on `lengths` alone.
    Returns the batches as lists of indices into `lengths`; ties keep their order.
    """
    batches: list[list[int]] = []
    width = tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        padded = (len(batches[-1]) + 1) * width if batches else 0
        full = not batches or len(batches[-1]) >= max_rows or padded > max_tokens
        if full or padded - tokens - lengths[index] > max_padding * padded:
            batches.append([])
            width, tokens = lengths[index], 0
        batches[-1].append(index)
        tokens += lengths[index]
    return batches


def fill(lengths: Sequence[int], max_tokens: int, max_rows: int) -> list[list[int]]:
    """As `pack`, for batches that are not padded: only the sequences' own tokens count."""
    batches: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or len(batches[-1]) >= max_rows or tokens + lengths[index] > max_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += lengths[index]
    return batches
