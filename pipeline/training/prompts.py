"""Which prompt is sampled where, as pure functions of the seed and the position: a resume needs no hidden state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache

import torch


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits for a purpose, such as derive_seed(1000, "rollout", rank, phase)."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_for(device: torch.device, *parts: int | str) -> torch.Generator:
    """A generator on `device`, seeded for a purpose."""
    return torch.Generator(device=device).manual_seed(derive_seed(*parts))


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "prompts", epoch))
    return tuple(torch.randperm(size, generator=generator).tolist())


def prompt_at(position: int, size: int, seed: int) -> int:
    """The data set's row at a global position: a fresh permutation of its `size` rows each epoch."""
    return _permutation(size, seed, position // size)[position % size]


def phase_prompts(phase: int, rank: int, world: int, count: int, size: int, seed: int, group: int = 1) -> list[int]:
    """The rows that a rank samples in a phase: each of its count / group positions' rows `group` times in a row.

    A group thus is on one rank, and `count` must be a multiple of `group`.
    """
    prompts = count // group
    start = (phase * world + rank) * prompts
    return [prompt_at(position, size, seed) for position in range(start, start + prompts) for _ in range(group)]


def all_prompts(phases: int, world: int, count: int, size: int, seed: int, group: int = 1) -> list[int]:
    """Every row that a whole training uses, in order, without repetitions."""
    total = phases * world * (count // group)
    if total >= size:
        return list(range(size))
    return sorted({prompt_at(position, size, seed) for position in range(total)})


def blocks(items: Iterable[int], size: int) -> list[list[int]]:
    """`items` in lists of `size`; the last may be shorter."""
    all_items = list(items)
    return [all_items[start : start + size] for start in range(0, len(all_items), size)]
