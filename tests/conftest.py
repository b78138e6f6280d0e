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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests start servers or jobs come first: they take longest, and with the short ones at the end all
    workers end at about the same time."""
    slow = {item.path for item in items if any(mark.name in MUST_RUN for mark in item.iter_markers())}
    items.sort(key=lambda item: item.path not in slow)


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
