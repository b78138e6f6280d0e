"""For all tests: what may be skipped where, and what tritonserver runs in."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pipeline.serving.engines import Engine

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


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """What tritonserver runs in: the default cache's; the first run on a machine builds it, in a minute or two."""
    from helpers_serving import serving_config

    from pipeline.serving.sandbox import open_sandbox, prepare

    log = tmp_path_factory.mktemp("engine") / "build.log"
    with open_sandbox(prepare(serving_config(), log, print), log) as engine:
        yield engine
