"""The presets' names. Apart, so that --help reads them without the schema."""

from __future__ import annotations

import os
from collections.abc import Mapping

from pipeline.errors import UserError, nearest

METHODS = ("ppo", "ilql", "sft", "reward-model")
"""Presets at every size, as METHOD-SIZE; each has a file."""
SIZES = ("gptj", "125M", "1B", "6B", "20B")
"""trlX's CONFIG_NAMEs, with gptj for none. A size by itself is PPO's."""
OTHERS = ("demo",)
SUMMARY = (
    f"{', '.join(OTHERS)}; {', '.join(METHODS)}, at the size that $CONFIG_NAME says ({', '.join(SIZES)}; "
    f"default {SIZES[0]}) or that is appended, as in {METHODS[1]}-{SIZES[3]}; a size by itself is {METHODS[0]}'s"
)
"""All of them, for people."""


def preset_names() -> tuple[str, ...]:
    """Every name, those of methods without a size too."""
    return (*OTHERS, *METHODS, *SIZES, *(f"{method}-{size}" for method in METHODS for size in SIZES))


def chosen_preset(preset: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The preset that `--preset` and $CONFIG_NAME stand for. UserError when a name, or a size, is none."""
    named = environ.get("CONFIG_NAME")
    name = preset or named or SIZES[0]
    if name not in preset_names():
        option = f"--preset {name}" if preset else f"CONFIG_NAME: {name}"
        raise UserError(f"{option}: unknown preset{nearest(name, preset_names())}; there are: {SUMMARY}")
    if name not in METHODS:
        return name
    size = (named if preset else None) or SIZES[0]
    if size not in SIZES:
        raise UserError(f"CONFIG_NAME: {size}: unknown size{nearest(size, SIZES)}; {name} has: {', '.join(SIZES)}")
    return f"{name}-{size}"


def file_and_size(name: str) -> tuple[str, str | None]:
    """(the preset's file, the size in it, None where it has none)."""
    if name in SIZES:
        return METHODS[0], name
    for method in METHODS:
        if name in (method, *(f"{method}-{size}" for size in SIZES)):
            return method, name[len(method) + 1 :] or SIZES[0]
    return name, None
