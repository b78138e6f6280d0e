"""Mean, variance and extremes of values that are spread over ranks, from one small vector a rank."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

NUMBERS = 5
"""Of a part: count, mean, sum of squared deviations, least, greatest."""


@dataclass(frozen=True)
class Spread:
    """What is known of all values together; an empty one is the start of a merger."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """The sum of squared deviations from the mean."""
    least: float = math.inf
    greatest: float = -math.inf

    @property
    def variance(self) -> float:
        """Biased: divided by the count."""
        return self.squares / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        return math.sqrt(self.variance)

    def row(self, name: str) -> dict[str, float]:
        """As metrics, under trlX's names."""
        values = {"mean": self.mean, "std": self.std, "min": self.least, "max": self.greatest}
        return {f"{name}/{key}": value for key, value in values.items()}


def part_of(values: Tensor) -> Tensor:
    """The NUMBERS (5,) of one rank's values (n,), n > 0, in float64; nothing is read back from the device."""
    wide = values.detach().double()
    mean = wide.mean()
    count = wide.new_tensor(float(wide.numel()))
    return torch.stack([count, mean, (wide - mean).square().sum(), wide.min(), wide.max()])


def merged(parts: Iterable[Iterable[float]]) -> Spread:
    """All ranks' values together (Chan, Golub and LeVeque 1979: moments merged by groups), in rank order."""
    total = Spread()
    for part in parts:
        count, mean, squares, least, greatest = part
        both, delta = total.count + count, mean - total.mean
        total = Spread(
            both,
            total.mean + delta * count / both,
            total.squares + squares + delta * delta * total.count * count / both,
            min(total.least, least),
            max(total.greatest, greatest),
        )
    return total
