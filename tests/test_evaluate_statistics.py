"""The statistics of a comparison, against tables and hand-made samples."""

from __future__ import annotations

import pytest

from pipeline.evaluation.statistics import paired_difference, t_quantile, win_rate


@pytest.mark.parametrize(
    ("degrees", "table"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)],
)
def test_t_quantiles_are_those_of_the_tables(degrees: int, table: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(table, abs=5e-5)


def test_the_interval_of_five_pairs_by_hand() -> None:
    before, after = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 2.0, 5.0, 5.0, 6.0]
    # differences 1, 0, 2, 1, 1: mean 1, standard deviation sqrt(0.5), error sqrt(0.1), t(4) = 2.7764
    paired = paired_difference(before, after)
    assert paired.mean == pytest.approx(1.0) and paired.n == 5
    assert paired.high - 1.0 == pytest.approx(2.7764 * 0.1**0.5, abs=1e-4)
    assert 1.0 - paired.low == pytest.approx(2.7764 * 0.1**0.5, abs=1e-4)
    assert win_rate(before, after) == 0.9


def test_one_pair_claims_nothing() -> None:
    with pytest.raises(ValueError, match="at least two pairs"):
        paired_difference([1.0], [2.0])


def test_ties_count_half() -> None:
    assert win_rate([0.0, 0.0, 1.0], [0.0, 1.0, 0.0]) == 0.5
