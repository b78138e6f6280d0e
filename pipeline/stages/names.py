"""The stages' names, in the order in which they run. Apart, so that reading them imports nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pipeline.errors import UserError, nearest

StageName = Literal["prefetch", "sft", "reward-model", "sandbox", "convert", "serve", "train", "evaluate"]

STAGES: tuple[StageName, ...] = (
    *("prefetch", "sft", "reward-model", "sandbox", "convert", "serve", "train", "evaluate"),
)

TRAININGS = ("sft", "reward-model", "train")
"""Stages that save when they are asked to stop, and go on from there."""


def select_stages(
    wanted: str, everything: Sequence[str], start: str | None = None, until: str | None = None
) -> tuple[str, ...]:
    """Turn `--stage`, `--from` and `--until` into stages in running order.

    `wanted` is "all" (the preset's `everything`) or names joined by commas; names outside `everything` may be
    asked for one by one.
    """
    names = tuple(everything) if wanted == "all" else tuple(name.strip() for name in wanted.split(","))
    for option, name in [("--stage", name) for name in names] + [("--from", start), ("--until", until)]:
        if name is not None and name not in STAGES:
            raise UserError(f"{option} {name}: unknown stage{nearest(name, STAGES)}; stages: {', '.join(STAGES)}")
    first = _index(start) if start else 0
    last = _index(until) if until else len(STAGES) - 1
    chosen = tuple(name for name in STAGES[first : last + 1] if name in names)
    if not chosen:
        bounds = " ".join(f"{option} {name}" for option, name in (("--from", start), ("--until", until)) if name)
        raise UserError(f"{bounds}: leaves no stage of --stage {wanted}; choose other bounds")
    return chosen


def _index(name: str) -> int:
    return list[str](STAGES).index(name)
