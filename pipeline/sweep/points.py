"""The points of a sweep: the product of all --sweep options, each with a name that a folder can have."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.run import atomic

POINTS = "points.json"
"""In the sweep's folder: the points of all its commands."""
SHARED = "shared"
"""The run, in the sweep's folder, of the stages that no swept key changes."""
STOP = "control/stop"
"""In the sweep's folder: pipeline.cancel has ended the sweep, so its submitter hands over no further point."""
_LONGEST = 120
"""Characters of a point's name; file systems take 255 bytes, and job folders lie below."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    values: dict[str, str]
    """Each swept key's value, as people write it."""

    @property
    def overrides(self) -> list[str]:
        """The point's settings, as --set takes them."""
        return [f"{key}={value}" for key, value in self.values.items()]


def parse_sweep(text: str) -> tuple[str, list[str]]:
    """(key, values as YAML) of "ppo.lam=0.9,0.95". Commas inside brackets or quotes divide nothing.

    UserError for an option that is none of this form, and for a value that is given twice.
    """
    key, equals, listed = text.partition("=")
    if not equals or not all(re.fullmatch(r"\w+", part, re.ASCII) for part in key.split(".")):
        raise UserError(f"--sweep {text}: expected key=values, as in --sweep ppo.init_kl_coef=0.02,0.05,0.1")
    try:
        values = yaml.safe_load(f"[{listed}]")
    except yaml.YAMLError as error:
        raise UserError(f"--sweep {text}: the values are not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, list) or not values:
        raise UserError(f"--sweep {text}: there is no value; give some, divided by commas")
    shown = [_shown(value, text) for value in values]
    for value in shown:
        if shown.count(value) > 1:
            raise UserError(f"--sweep {text}: {value} is given twice; remove one")
    return key, shown


def make_points(sweeps: Sequence[str]) -> list[Point]:
    """The product of all options, the last one's values changing fastest."""
    axes = [parse_sweep(text) for text in sweeps]
    keys = [key for key, _ in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--sweep {key}: is given twice; give all its values in one option")
    combinations = itertools.product(*(values for _, values in axes))
    return [_point(dict(zip(keys, combination, strict=True))) for combination in combinations]


def preset_of(folder: Path) -> str | None:
    """The preset that the sweep's points began with, for those that it is given later; None where it has none yet."""
    names = [Point(**raw).name for raw in atomic.read_json(folder / POINTS) or []]
    for config in (folder / name / "config.yaml" for name in (SHARED, *names)):
        if config.exists():
            preset = (yaml.safe_load(config.read_text("utf-8")) or {}).get("preset")
            return None if preset is None else str(preset)
    return None


def read_points(folder: Path) -> list[Point]:
    """The points that a sweep's folder has; UserError where it is no such folder."""
    raw = atomic.read_json(folder / POINTS)
    if raw is None:
        raise UserError(f"{folder}: not a sweep (no {POINTS}); give the folder that --run-dir named with --sweep")
    return [Point(**point) for point in raw]


def remember(folder: Path, points: Sequence[Point]) -> None:
    """Add points to those that the folder has from earlier commands."""
    known = read_points(folder) if (folder / POINTS).exists() else []
    names = {point.name for point in known}
    new = [point for point in points if point.name not in names]
    atomic.write_json(folder / POINTS, [{"name": p.name, "values": p.values} for p in (*known, *new)])


def _point(values: dict[str, str]) -> Point:
    """With what a path, a shell or a container's option could misread replaced, and then a mark of the whole."""
    whole = "__".join(f"{key}={value}" for key, value in values.items())
    name = re.sub(r"[^\w.=+-]+", "_", whole, flags=re.ASCII)
    if name != whole or len(name) > _LONGEST:
        name = f"{name[:_LONGEST]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    return Point(name, values)


def _shown(value: Any, text: str) -> str:
    """A value as YAML of one line: bare where it is plain, else as JSON."""
    if isinstance(value, str) and value and yaml.safe_load(f"[{value}]") == [value]:
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:
        raise UserError(f"--sweep {text}: {value} is a {type(value).__name__}; quote what is meant as text") from None
