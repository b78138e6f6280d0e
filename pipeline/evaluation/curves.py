"""Line charts as inline SVG, without scripts: colours come from the page's style sheet, so they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 30
"""Space around the plotting area, in SVG units."""
MAX_POINTS = 400
"""A longer curve is thinned: more points than pixels only make the page heavy."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """A named line of finite (x, y) points, in order of x."""

    name: str
    points: Points


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) from the range [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def format_number(value: float) -> str:
    """A short figure: four significant digits, no trailing zeros, 12k and 3.4M for large ones."""
    for limit, suffix in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e6 if suffix == 'M' else 1e3):.4g}{suffix}"
    return "0" if abs(value) < 1e-12 else f"{value:.4g}"


def thin(points: Points, limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most about `limit` points: every n-th, and the last."""
    if len(points) <= limit:
        return list(points)
    stride = math.ceil(len(points) / limit)
    kept = list(points[::stride])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def render_chart(title: str, curves: Sequence[Curve], x_label: str = "optimiser step") -> str:
    """An SVG line chart of `curves` (at most four), with a title for people who cannot see it; "" without points."""
    curves = [Curve(curve.name, thin(curve.points)) for curve in curves if curve.points]
    if not curves:
        return ""
    x_low, x_high = _range([x for curve in curves for x, _ in curve.points], pad=0.0)
    y_low, y_high = _range([y for curve in curves for _, y in curve.points], pad=0.06)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in nice_ticks(y_low, y_high):
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 3.5, format_number(tick), "end"))
    for tick in nice_ticks(x_low, x_high):
        x, _ = place(tick, y_low)
        parts.append(_text(x, HEIGHT - BOTTOM + 14, format_number(tick), "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, x_label, "middle"))
    for number, curve in enumerate(curves):
        placed = [place(x, y) for x, y in curve.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        name = f"<title>{escape(curve.name)}</title>"
        parts.append(f'<polyline class="line s{number % 4}" points="{path}">{name}</polyline>')
        x, y = placed[-1]
        parts.append(f'<circle class="dot s{number % 4}" cx="{x:.1f}" cy="{y:.1f}" r="2.8"/>')
    return "".join([*parts, "</svg>"])


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _range(values: Sequence[float], pad: float) -> tuple[float, float]:
    """The values' range widened by `pad` of it on both sides; a single value gets room around it."""
    low, high = min(values), max(values)
    if high == low:
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    return low - pad * (high - low), high + pad * (high - low)
