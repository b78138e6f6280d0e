"""Judging a reward model by preference pairs: every figure against one that was worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers_ppo import make_run, preferences, tiny_config

from pipeline import rm_eval
from pipeline.errors import UserError
from pipeline.evaluation.pairs import CATEGORIES, Pair, category_scores, read_pairs
from pipeline.evaluation.reward_model import calibration_error, judge, log_sigmoid, reliability
from pipeline.evaluation.statistics import wilson

LN3, LN9 = math.log(3.0), math.log(9.0)
"""Margins at which the model says 0.75 and 0.9."""


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (50, 100, 0.4038, 0.5962)],
)
def test_wilsons_interval_is_that_of_the_tables(successes: int, count: int, low: float, high: float) -> None:
    estimate = wilson(successes, count)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((successes / count, low, high), abs=5e-5)


def test_six_pairs_by_hand() -> None:
    margins = [LN3, LN3, LN3, -LN3, LN9, LN9]
    pairs = [Pair("p", "c", "r")] * 6
    report = judge(pairs, margins, [0.0] * 6)
    assert report["accuracy"]["value"] == 5 / 6
    assert report["margin"]["value"] == pytest.approx((2 * LN3 + 2 * LN9) / 6)
    # sure by 0.75 four times, and right three times: no error; by 0.9 twice, and right twice: 0.1
    assert report["calibration_error"]["value"] == pytest.approx(2 * 0.1 / 6)
    assert report["brier"]["value"] == pytest.approx((3 * 0.25**2 + 0.75**2 + 2 * 0.1**2) / 6)
    assert report["nll"]["value"] == pytest.approx(-(3 * math.log(0.75) + math.log(0.25) + 2 * math.log(0.9)) / 6)
    table = [(row["pairs"], round(row["confidence"], 9), row["accuracy"]) for row in report["reliability"]]
    assert table == [(4, 0.75, 0.75), (2, 0.9, 1.0)]
    assert "subsets" not in report and "score" not in report


def test_ties_are_half_right_and_the_model_knows_it() -> None:
    report = judge([Pair("p", "c", "r")] * 4, [0.0] * 4, [0.0] * 4)
    assert (report["accuracy"]["value"], report["ties"], report["calibration_error"]["value"]) == (0.5, 4, 0.0)
    assert report["nll"]["value"] == pytest.approx(math.log(2.0))
    assert [(row["from"], row["pairs"]) for row in report["reliability"]] == [(0.5, 4)]


def test_a_model_that_is_sure_and_wrong_is_badly_calibrated() -> None:
    wrong = calibration_error([-50.0] * 30)
    assert wrong.value == pytest.approx(1.0) and wrong.low == pytest.approx(1.0)
    assert [row["to"] for row in reliability([1000.0, -1000.0])] == [1.0]  # nothing overflows
    assert log_sigmoid(-1000.0) == -1000.0


def test_the_interval_of_the_calibration_error_covers_that_of_the_whole_population() -> None:
    """800 pairs, of which the model is sure by 0.9 and right in 70 %: its error is 0.2."""
    margins = [LN9 if number % 10 < 7 else -LN9 for number in range(800)]
    error = calibration_error(margins)
    assert error.value == pytest.approx(0.2)
    # one bin: the error is a share's distance from 0.9, and the share's standard error is 0.0162
    assert (error.low, error.high) == pytest.approx((0.2 - 1.96 * 0.0162, 0.2 + 1.96 * 0.0162), abs=4e-3)


def test_categories_are_averaged_by_rewardbenchs_weights() -> None:
    scores = category_scores({"math-prm": 0.5, "hep-cpp": 1.0, "alpacaeval-easy": 0.9, "of no category": 0.0})
    assert scores == {"Chat": 0.9, "Reasoning": pytest.approx((984 * 0.5 + 164 * 1.0) / 1148)}
    assert {name: sum(weights.values()) for name, weights in CATEGORIES.items()} == {
        "Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968,
    }  # fmt: skip


def bench(subset: str, prompt: str = "Why?") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": "Because.", "rejected": "No.\n", "subset": subset, "id": 1}


def test_all_categories_together_are_the_score() -> None:
    subsets = ["alpacaeval-easy", "mt-bench-hard", "donotanswer", "math-prm"]
    pairs = [Pair("p", "c", "r", subset) for subset in subsets for _ in range(2)]
    report = judge(pairs, [1, 1, 1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 1, 1, 1])
    assert report["categories"] == {"Chat": 1.0, "Chat Hard": 0.5, "Safety": 0.5, "Reasoning": 0.0}
    assert report["score"] == 0.5
    assert report["subsets"]["donotanswer"]["pairs"] == 2


def test_rewardbenchs_files_are_read_as_turns_of_a_dialogue(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [bench("math-prm"), bench("donotanswer", "\n\nHuman: Why?\n\nAssistant:")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data/filtered-00000-of-00001.parquet")
    expected = [
        Pair("\n\nHuman: Why?\n\nAssistant:", " Because.", " No.", subset) for subset in ("math-prm", "donotanswer")
    ]
    assert read_pairs(tmp_path / "rows.jsonl") == expected
    assert read_pairs(tmp_path / "data") == expected


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "has no preference pair"),
        (json.dumps(bench("math-prm")) + "\n" + '{"prompt": "a", "subset": "b"}', r"rows\.jsonl:2: the row has no 'ch"),
        ('{"chosen": "a", "rejected": 3}', r"rows\.jsonl:1: the row has a 'rejected' that is int"),
    ],
)
def test_malformed_pairs_are_named(content: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(UserError, match=fault):
        read_pairs(tmp_path / "rows.jsonl")


def test_no_pairs_where_they_should_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        read_pairs(tmp_path / "gone")
    with pytest.raises(UserError, match=r"has no test\.jsonl"):
        read_pairs(tmp_path)
    (tmp_path / "test.parquet").write_text("not one")
    with pytest.raises(UserError, match=r"test\.parquet: cannot be read"):
        read_pairs(tmp_path)


def test_the_runs_test_split_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, tiny_config())
    assert rm_eval.main(["--run", str(run.root), "--out", str(tmp_path / "judged.json")]) == 0
    report = json.loads((tmp_path / "judged.json").read_text())
    assert report["pairs"] == len(preferences()["test"])
    assert sum(row["pairs"] for row in report["reliability"]) == report["pairs"]
    assert f"accuracy           {report['accuracy']['value']:.4f}" in capsys.readouterr().out
    data = run.artifact("prefetch", "data")
    assert rm_eval.main(["--run", str(run.root), "--data", str(data), "--out", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == report
