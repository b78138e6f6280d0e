"""What a look at the machine found, as data and as text."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

Level = Literal["ok", "warn", "fail", "unknown"]

_MARKS: dict[Level, tuple[str, str]] = {
    "ok": ("✓", "32"),
    "warn": ("!", "33"),
    "fail": ("✗", "31"),
    "unknown": ("?", "36"),
}
_SAID: dict[Level, str] = {"fail": "will not work", "warn": "to look at", "unknown": "not known", "ok": "fine"}


@dataclass(frozen=True)
class Finding:
    """One line about one thing, and one line on how to mend it."""

    topic: str
    level: Level
    what: str
    remedy: str = ""


def fails(findings: Sequence[Finding]) -> bool:
    """Whether something will not work."""
    return any(each.level == "fail" for each in findings)


def render(findings: Sequence[Finding], colour: bool, width: int = 120) -> str:
    """A block a topic, in the given order, and a line with the numbers."""
    lines = []
    for topic, members in groupby(findings, key=lambda each: each.topic):
        lines.append(f"\x1b[1m{topic}\x1b[0m" if colour else topic)
        for each in members:
            lines += _render_one(each, colour, width)
    counts = Counter(each.level for each in findings)
    lines += [
        "",
        ", ".join(f"{counts[level]} {said}" for level, said in _SAID.items() if counts[level] or said == "fine"),
    ]
    return "\n".join(lines)


def _render_one(finding: Finding, colour: bool, width: int) -> list[str]:
    mark, code = _MARKS[finding.level]
    shown = f"\x1b[{code}m{mark}\x1b[0m" if colour else mark
    lines = [f"  {shown} {line}" if number == 0 else f"    {line}" for number, line in _wrap(finding.what, width)]
    if finding.remedy and finding.level != "ok":
        lines += [f"    {'→' if number == 0 else ' '} {line}" for number, line in _wrap(finding.remedy, width)]
    return lines


def _wrap(text: str, width: int) -> list[tuple[int, str]]:
    """Lines that fit behind the indent; a path longer than a line stays whole, so that it can be copied."""
    wrapped = textwrap.wrap(text, max(40, width - 6), break_long_words=False, break_on_hyphens=False)
    return list(enumerate(wrapped))
