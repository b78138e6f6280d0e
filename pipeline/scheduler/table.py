"""Status lines as text: aligned columns, bars and times, coloured only where a terminal reads them."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.scheduler.view import StageView

_COLOURS = {"done": "32", "running": "36", "failed": "31", "cancelled": "33", "stopped": "33", "skipped": "32"}
_MARKS = {"done": "✓", "skipped": "✓", "running": "▶", "failed": "✗", "cancelled": "–", "stopped": "■"}


def render_table(views: Sequence[StageView], colour: bool, width: int = 120) -> str:
    """One line a stage: mark, name, state, time, progress and what there is to say."""
    return "\n".join(render_line(view, colour, width) for view in views)


def render_line(view: StageView, colour: bool, width: int = 120) -> str:
    """One stage's line, no longer than `width` characters."""
    mark = _MARKS.get(view.state, "·")
    head = f"{mark} {view.stage:<13}{view.state:<10}{duration(view.seconds):>7}  "
    text = _progress(view) + "; ".join(filter(None, [view.detail, view.queue]))
    room = max(20, width - len(head))
    if len(text) > room and view.state != "failed" and not view.stuck:  # what has to be acted on is never cut
        text = text[: room - 1] + "…"
    if colour and view.state in _COLOURS:
        head = f"\x1b[{_COLOURS[view.state]}m{head}\x1b[0m"
    return (head + text).rstrip()


def duration(seconds: float | None) -> str:
    """Seconds as 4.2s, 3m12s or 5h04m."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes = int(seconds // 60)
    return f"{minutes}m{int(seconds % 60):02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def _progress(view: StageView) -> str:
    if not view.total or view.state != "running":
        return ""
    filled = int(12 * min(1.0, view.step / view.total))
    return f"{'█' * filled}{'░' * (12 - filled)} {view.step}/{view.total}  "
