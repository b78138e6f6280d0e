"""Keys and values of many sequences in memory that is laid out once: each in a slot, its positions from column 0 on.

A forward does one of two things. It fills slots with whole prompts, padded on the right, which causality alone hides;
or it adds one position to each of the first rows. Rows come and go without anything being moved but the last row's
content into a slot that became free.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_ALIGNMENT = 64
"""Bytes."""


class SlotCache(Cache):  # type: ignore[misc]  # transformers has no types
    """A transformers cache of `layers` layers; `reserve` tells its size before the first forward."""

    def __init__(self, layers: int) -> None:
        self.positions: Tensor | None = None
        """(b,): the column that the forward adds to each of the first b slots; None while it fills slots."""
        self.first = 0
        """The slot of the first prompt that the forward brings."""
        self.slots: Tensor | None = None
        """(b,): 0 to b - 1, while rows are extended."""
        self.width = 0
        """Columns that the rows may look at, the added ones among them."""
        self._rows = self._length = 0
        self._store: Tensor | None = None  # (layers, 2, rows, heads, length, D): one tensor, so that a move is one copy
        super().__init__(layers=[_SlotLayer(self, index) for index in range(layers)])

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` sequences of up to `length` positions; memory is taken at the first forward."""
        self._rows, self._length, self._store = rows, length, None

    def release(self) -> None:
        """Give the memory back at once: cache and layers know each other, and would wait for Python's collector."""
        self._store = None
        for layer in self.layers:
            layer.keys = layer.values = None

    def fill(self, first: int) -> None:
        """The next forward brings prompts for the slots from `first` on."""
        self.first, self.positions = first, None

    def extend(self, positions: Tensor, width: int) -> None:
        """The next forward adds one position a row: row i's is column `positions[i]`, all below `width`."""
        self.positions, self.width = positions, width
        self.slots = torch.arange(len(positions), device=positions.device)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row of `length` positions to another slot."""
        if self._store is not None:
            self._store[:, :, target, :, :length] = self._store[:, :, source, :, :length]

    def store(self, layer: int, like: Tensor) -> Tensor:
        """A layer's (2, rows, heads, length, D): keys and values.

        Under autocast they are kept in its type, which attention rounds them to anyhow: rotary positions leave the keys
        of a float32 stream in float32, and each step would read them twice as wide, and round all of them again.
        """
        if self._store is None:
            _, heads, _, size = like.shape
            kind = like.device.type
            if torch.is_autocast_enabled(kind):
                like = like.to(torch.get_autocast_dtype(kind))
            self._store = _zeros((len(self.layers), 2, self._rows, heads, self._length, size), like)
        return self._store[layer]


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's part of a SlotCache."""

    is_sliding = False
    is_croppable = False

    def __init__(self, cache: SlotCache, index: int) -> None:
        super().__init__()
        self._cache, self._index = cache, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._cache.store(self._index, key_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep new keys and values (b, heads, T, D); return those that the new positions may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        cache = self._cache
        rows, _, length, _ = key_states.shape
        if cache.positions is None:
            for kept, new in ((self.keys, key_states), (self.values, value_states)):
                kept[cache.first : cache.first + rows, :, :length] = new
            return key_states, value_states
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept[cache.slots, :, cache.positions] = new[:, :, 0].to(kept.dtype)
        return self.keys[:rows, :, : cache.width], self.values[:rows, :, : cache.width]

    def get_seq_length(self) -> int:
        """Columns before the forward's own: none while it fills slots."""
        return 0 if self._cache.positions is None else self._cache.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask, and where they begin."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.keys.shape[2] if self.keys is not None else -1


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of the type and on the device of `like`: a masked column must not hold NaN by chance.

    On a CPU they come from calloc, so that only the columns that are used ever take memory and time; aligned like
    torch's own memory, on which the last bits of a matrix product may depend.
    """
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    size = math.prod(shape) * like.element_size()
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return torch.from_numpy(raw[start : start + size]).view(like.dtype).view(shape)
