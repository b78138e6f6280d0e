"""For all tests: what may be skipped where."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

MUST_RUN = ("apptainer", "chain", "slurm", "triton")
"""Marks of tests that CI may not skip: it has what they need. Those marked hh too may, where the rows are missing."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    marks = {mark.name for mark in item.iter_markers()}
    if report.skipped and "CI" in os.environ and marks.intersection(MUST_RUN) and "hh" not in marks:
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {report.longrepr}"
    return report
