"""What PPO carries from phase to phase beside the weights: the KL coefficient and the scores' running moments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class KLController:
    """Keeps the KL near a target by scaling its coefficient (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    `target` None fixes the coefficient.
    """

    coefficient: float
    target: float | None
    horizon: int

    def updated(self, kl: float, samples: int) -> KLController:
        """After a phase whose mean KL per response was `kl` nats: beta *= 1 + clip(kl/target - 1, +-0.2) * n/horizon.

        `samples` counts the phase's rollouts of all ranks. A phase larger than the horizon counts as one horizon, so
        that the coefficient stays positive.
        """
        if self.target is None:
            return self
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        return replace(self, coefficient=self.coefficient * (1.0 + error * min(1.0, samples / self.horizon)))


@dataclass(frozen=True)
class RunningMoments:
    """Mean and standard deviation of all scores so far (Chan, Golub and LeVeque 1979: moments merged by groups)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """The sum of squared deviations from the mean."""

    def updated(self, scores: Sequence[float]) -> RunningMoments:
        """With a phase's scores, those of all ranks in rank order, merged in."""
        if not scores:
            return self
        count = len(scores)
        mean = math.fsum(scores) / count
        squares = math.fsum((score - mean) ** 2 for score in scores)
        total = self.count + count
        delta = mean - self.mean
        return RunningMoments(
            count=total,
            mean=self.mean + delta * count / total,
            squares=self.squares + squares + delta * delta * self.count * count / total,
        )

    @property
    def std(self) -> float:
        """The unbiased standard deviation; 1 while there is none."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 and self.squares > 0 else 1.0


def clip_scores(scores: Sequence[float], limit: float | None) -> list[float]:
    """Scores within +-limit, if any: what a reward model says about text far from its training data is not trusted."""
    if limit is None:
        return list(scores)
    return [min(max(score, -limit), limit) for score in scores]


def scale_of(mode: str, ref_std: float | None, moments: RunningMoments) -> float:
    """What scores are divided by. Their mean is kept: it is what pays for ending a response."""
    if mode == "running":
        return moments.std
    if mode == "ref":
        assert ref_std is not None, "checked with the configuration"
        return ref_std
    return 1.0


def moments_from(raw: dict[str, Any]) -> RunningMoments:
    """Moments as a checkpoint holds them."""
    return RunningMoments(int(raw["count"]), float(raw["mean"]), float(raw["squares"]))
