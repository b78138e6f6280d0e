"""How good a reward model is on preference pairs: accuracy, margin and calibration, each with its 95 % interval.

A margin is the chosen answer's reward minus the rejected one's. The model says sigmoid(margin) for the probability
that people choose as they did (Bradley-Terry), which is what calibration is about.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.evaluation.pairs import Pair, category_scores
from pipeline.evaluation.statistics import Estimate, mean_estimate, wilson

BINS = 10
"""Of equal width, from confidence 0.5 to 1."""
_RESAMPLES = 2000


def judge(pairs: Sequence[Pair], chosen: Sequence[float], rejected: Sequence[float]) -> dict[str, Any]:
    """The report as plain JSON types. ValueError with fewer than two pairs."""
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    report: dict[str, Any] = {
        "pairs": len(pairs),
        "ties": sum(margin == 0.0 for margin in margins),
        "accuracy": asdict(accuracy(margins)),
        "margin": asdict(mean_estimate(margins)),
        "chosen_mean": statistics.fmean(chosen),
        "rejected_mean": statistics.fmean(rejected),
        "nll": asdict(mean_estimate([-log_sigmoid(margin) for margin in margins])),
        "brier": asdict(mean_estimate([(1.0 - math.exp(log_sigmoid(margin))) ** 2 for margin in margins])),
        "calibration_error": asdict(calibration_error(margins)),
        "reliability": reliability(margins),
    }
    subsets: dict[str, list[float]] = {}
    for pair, margin in zip(pairs, margins, strict=True):
        subsets.setdefault(pair.subset, []).append(margin)
    if set(subsets) != {""}:
        scores = {name: accuracy(group) for name, group in sorted(subsets.items())}
        report["subsets"] = {name: {**asdict(score), "pairs": len(subsets[name])} for name, score in scores.items()}
        categories = category_scores({name: score.value for name, score in scores.items()})
        report["categories"] = categories
        if len(categories) == 4:
            report["score"] = statistics.fmean(categories.values())
    return report


def accuracy(margins: Sequence[float]) -> Estimate:
    """The share of pairs in which the chosen answer has the higher reward; a tie counts half."""
    return wilson(sum(map(_right, margins)), len(margins))


def reliability(margins: Sequence[float]) -> list[dict[str, Any]]:
    """How often the model is right, by how sure it is: the bins that hold any pair.

    Which answer is called chosen is the people's doing, so a pair speaks of one probability only: the confidence
    sigmoid(|margin|), between 0.5 and 1, that the answer with the higher reward was chosen.
    """
    groups: dict[int, list[float]] = {}
    for margin in margins:
        groups.setdefault(_bin(margin), []).append(margin)
    table = []
    for place, group in sorted(groups.items()):
        right = accuracy(group)
        table.append(
            {
                "from": 0.5 + 0.5 * place / BINS,
                "to": 0.5 + 0.5 * (place + 1) / BINS,
                "pairs": len(group),
                "confidence": statistics.fmean(map(_confidence, group)),
                "accuracy": right.value,
                "low": right.low,
                "high": right.high,
            }
        )
    return table


def expected_calibration_error(gaps: Sequence[float], pairs: int) -> float:
    """The expected calibration error (Guo et al. 2017, arXiv:1706.04599) of bins of equal width.

    sum over bins of (n_bin / n) * |accuracy - mean confidence|, where a pair's confidence is sigmoid(|margin|) and a
    tie is half right; `gaps` holds, by bin, the sum over its pairs of (right - confidence).
    """
    return math.fsum(map(abs, gaps)) / pairs


def calibration_error(margins: Sequence[float], seed: int = 0) -> Estimate:
    """The expected calibration error: the mean distance of accuracy from confidence over the bins, by their pairs.

    The interval is the basic bootstrap's: chance alone makes a resample's error larger, and it takes that off again.
    """
    place = np.array([_bin(margin) for margin in margins])
    gap = np.array([_right(margin) - _confidence(margin) for margin in margins])

    def error(rows: np.ndarray[Any, Any]) -> float:
        gaps = np.bincount(place[rows], weights=gap[rows], minlength=BINS)
        return expected_calibration_error(gaps.tolist(), len(rows))

    value = error(np.arange(len(gap)))
    draw = np.random.default_rng(seed)
    resampled = [error(draw.integers(0, len(gap), len(gap))) for _ in range(_RESAMPLES)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(value, max(0.0, 2 * value - float(high)), max(0.0, 2 * value - float(low)))


def log_sigmoid(x: float) -> float:
    """log(1 / (1 + exp(-x))), for any x."""
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def _right(margin: float) -> float:
    return 1.0 if margin > 0.0 else 0.5 if margin == 0.0 else 0.0


def _confidence(margin: float) -> float:
    return math.exp(log_sigmoid(abs(margin)))


def _bin(margin: float) -> int:
    return min(BINS - 1, int((_confidence(margin) - 0.5) * 2 * BINS))


def render(report: dict[str, Any]) -> str:
    """The report for a terminal."""

    def shown(name: str) -> str:
        each = report[name]
        return f"{each['value']:.4f}  [{each['low']:.4f}, {each['high']:.4f}]"

    lines = [
        f"pairs              {report['pairs']}" + (f" ({report['ties']} ties)" if report["ties"] else ""),
        f"accuracy           {shown('accuracy')}",
        f"mean margin        {shown('margin')}",
        f"calibration error  {shown('calibration_error')}",
        f"Brier score        {shown('brier')}",
        f"log loss           {shown('nll')}",
        "",
        "confidence     pairs  said    right   95 %",
    ]
    lines += [
        f"{row['from']:.2f} to {row['to']:.2f}  {row['pairs']:>6}  {row['confidence']:.3f}   {row['accuracy']:.3f}"
        f"   [{row['low']:.3f}, {row['high']:.3f}]"
        for row in report["reliability"]
    ]
    if "subsets" in report:
        lines += ["", f"{'subset':<24}pairs  accuracy  95 %"]
        lines += [
            f"{name:<24}{row['pairs']:>5}  {row['value']:.3f}     [{row['low']:.3f}, {row['high']:.3f}]"
            for name, row in report["subsets"].items()
        ]
        lines += ["", *(f"{name:<24}       {score:.3f}" for name, score in report["categories"].items())]
    if "score" in report:
        lines.append(f"{'RewardBench':<24}       {report['score']:.3f}")
    return "\n".join(lines)
