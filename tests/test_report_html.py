"""The report is one page that stands alone: every figure shown, every text escaped, what is missing left out."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

from pipeline.evaluation.curves import Curve, format_number, nice_ticks, render_chart, thin
from pipeline.evaluation.html import curve_points, number, render_report

VOID = {"meta", "line", "circle"}


class Balanced(HTMLParser):
    """Checks that every element is closed in order, and collects what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def make_report(**changes: Any) -> dict[str, Any]:
    report: dict[str, Any] = {
        "sft": {"reward_mean": 0.5, "delta_mean": -1.25, "length_mean": 17.5, "ended": 0.75},
        "policy": {"reward_mean": 2.5, "delta_mean": 0.75, "length_mean": 24.0, "ended": 1.0},
        "paired": {"mean": 2.0, "low": 1.5, "high": 2.5, "n": 200},
        "win_rate": 0.825,
        "kl": 7.125,
        "samples": [
            {
                "prompt": "\n\nHuman: How do I bake bread?\n\nAssistant:",
                "sft": " Go away.",
                "sft_reward": -1.5,
                "policy": " Happy to help!",
                "policy_reward": 2.25,
                "chosen": " Mix flour.",
                "chosen_reward": 1.0,
            }
        ],
        "reward_model": {"accuracy": 0.875, "margin": 2.0, "pairs": 300},
        "config": {"preset": "demo", "seed": 1000},
    }
    return {**report, **changes}


METRICS = [{"step": step, "reward/mean": step / 10, "policy/sqrt_kl": math.sqrt(step)} for step in range(5)]


def test_the_page_shows_the_result_and_stands_alone() -> None:
    page = render_report(make_report(), METRICS)

    parser = parse(page)
    assert parser.fetched == [] and "script" not in parser.tags and "@import" not in page and "url(" not in page
    text = re.sub(r"<[^>]+>", " ", page)
    for figure in ("0.500", "2.500", "−1.250", "+0.750", "+2.000", "+1.500 … +2.500", "82.5 %", "7.12", "87.5 %"):
        assert figure in text, figure
    assert "earns more reward than the SFT start: +2.000" in page
    assert "How do I bake bread?" in page and "Happy to help!" in page and "Go away." in page and "Mix flour." in page
    assert parser.tags.count("svg") == 2  # two of the metrics are there


def test_texts_from_the_data_cannot_become_markup() -> None:
    evil = "<script>alert('x')</script> & \"$title\""
    sample = {"prompt": evil, "sft": evil, "policy": evil, "chosen": evil}

    page = render_report(make_report(samples=[sample], config={"preset": evil, evil: evil}), METRICS)

    assert "script" not in parse(page).tags
    assert page.count("&lt;script&gt;") >= 7


def test_a_difference_that_may_be_chance_is_called_so() -> None:
    page = render_report(make_report(paired={"mean": 0.1, "low": -0.2, "high": 0.4, "n": 20}), [])
    assert "No clear difference" in page
    page = render_report(make_report(paired={"mean": -0.5, "low": -0.8, "high": -0.2, "n": 20}), [])
    assert "earns less reward" in page


def test_missing_and_infinite_figures_leave_dashes_and_no_curves() -> None:
    metrics = [{"step": 1, "reward/mean": math.nan}, {"step": None, "reward/mean": 1.0}, {"reward/mean": 2.0}]

    page = render_report({"sft": {"reward_mean": math.inf}, "paired": None, "kl": None}, metrics)

    assert "svg" not in parse(page).tags
    assert "nan" not in page.lower() and "inf" not in re.sub(r"<style>.*</style>", "", page, flags=re.S)
    assert "No paired comparison" in page and "No training metrics" in page and "No samples" in page


def test_an_empty_answer_is_seen_as_empty() -> None:
    assert "(empty)" in render_report(make_report(samples=[{"prompt": "p", "sft": "  "}]), [])


def test_a_curve_keeps_the_last_row_of_a_repeated_step() -> None:
    rows = [{"step": 2, "loss": 5.0}, {"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}, {"step": 3, "loss": True}]
    assert curve_points(rows, "loss") == [(1.0, 4.0), (2.0, 3.0)]


def test_the_chart_maps_its_first_and_last_point_to_the_corners() -> None:
    chart = render_chart("t", [Curve("a", [(0.0, 0.0), (10.0, 1.0)])])
    points = re.search(r'points="([^"]+)"', chart)
    assert points is not None
    (x0, y0), (x1, y1) = [tuple(map(float, pair.split(","))) for pair in points[1].split()]
    assert (x0, x1) == (52.0, 348.0)  # 360 wide, 52 left, 12 right
    # 158 units high, between 12 and 170; the range is widened by 6 % on both sides
    assert abs(y0 - (170 - 158 * 0.06 / 1.12)) < 0.06 and abs(y1 - (12 + 158 * 0.06 / 1.12)) < 0.06


def test_a_flat_or_single_point_curve_is_still_drawn() -> None:
    for points in ([(1.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)]):
        assert "nan" not in render_chart("t", [Curve("a", points)])
    assert render_chart("t", [Curve("a", [])]) == ""


def test_ticks_are_round_numbers_inside_the_range() -> None:
    assert nice_ticks(0, 10) == [0, 5, 10]
    assert all(0.03 <= tick <= 0.97 for tick in nice_ticks(0.03, 0.97))
    assert [round(tick, 9) for tick in nice_ticks(-1, 1)] == [-1, -0.5, 0, 0.5, 1]


def test_numbers_are_short() -> None:
    shown = {0.0: "0", 1234.0: "1234", 12340.0: "12.34k", 2.5e6: "2.5M", 1e-5: "1e-05"}
    assert [format_number(value) for value in shown] == list(shown.values())
    assert number(-0.5) == "−0.500" and number(None) == "–" and number(0.5, 1, sign=True) == "+0.5"


def test_a_long_curve_is_thinned_but_keeps_its_end() -> None:
    points = [(float(x), 0.0) for x in range(10_001)]
    thinned = thin(points, 100)
    assert len(thinned) <= 101 and thinned[0] == (0.0, 0.0) and thinned[-1] == (10_000.0, 0.0)
