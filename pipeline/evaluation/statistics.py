"""What a comparison of two policies on the same prompts, or of two answers by a reward model, may claim."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PairedDifference:
    """The mean of b - a over pairs, with its 95 % confidence interval by Student's t."""

    mean: float
    low: float
    high: float
    n: int


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> PairedDifference:
    """How much higher `b` is than `a`, pair by pair; ValueError with fewer than two pairs."""
    differences = [y - x for x, y in zip(a, b, strict=True)]
    if len(differences) < 2:
        raise ValueError("a paired difference needs at least two pairs")
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    reach = t_quantile(0.5 + confidence / 2.0, len(differences) - 1) * error
    return PairedDifference(mean, mean - reach, mean + reach, len(differences))


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def mean_estimate(values: Sequence[float]) -> Estimate:
    """The mean, with its interval by Student's t; ValueError with fewer than two values."""
    difference = paired_difference([0.0] * len(values), values)
    return Estimate(difference.mean, difference.low, difference.high)


def wilson(successes: float, count: int) -> Estimate:
    """A share, with Wilson's score interval: it stays within 0 and 1, and has a width even where all succeed."""
    z = statistics.NormalDist().inv_cdf(0.975)
    share, extra = successes / count, z * z / count
    middle = (share + extra / 2.0) / (1.0 + extra)
    reach = z / (1.0 + extra) * math.sqrt(share * (1.0 - share) / count + extra / (4.0 * count))
    return Estimate(share, max(0.0, middle - reach), min(1.0, middle + reach))


def win_rate(a: Sequence[float], b: Sequence[float]) -> float:
    """The share of pairs in which `b` is higher than `a`; a tie counts half."""
    wins = [1.0 if y > x else 0.5 if y == x else 0.0 for x, y in zip(a, b, strict=True)]
    return statistics.fmean(wins)


def t_quantile(probability: float, degrees: int) -> float:
    """The value that Student's t with `degrees` degrees of freedom stays below with `probability` (0.5 to 1)."""
    if not 0.5 <= probability < 1.0 or degrees < 1:
        raise ValueError("t_quantile takes a probability of 0.5 up to 1 and at least one degree of freedom")
    inside = 2.0 * probability - 1.0
    low, high = 0.0, 1.0
    while _t_inside(high, degrees) < inside:
        high *= 2.0
    for _ in range(100):
        middle = (low + high) / 2.0
        low, high = (middle, high) if _t_inside(middle, degrees) < inside else (low, middle)
    return (low + high) / 2.0


def _t_inside(t: float, degrees: int) -> float:
    """P(|T| < t): the finite series of Abramowitz and Stegun 26.7.3 (odd degrees) and 26.7.4 (even)."""
    theta = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2.0 / math.pi * (theta + sine * total) if odd else sine * total
