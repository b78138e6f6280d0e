"""Tests of parts that CI has cannot be skipped there unseen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers_jobs import ROOT, clean_environment

SKIPPED = """
import pytest

@pytest.fixture
def part():
    pytest.skip("there is none")

@pytest.mark.slurm
def test_of_a_part(part): ...

@pytest.mark.chain
@pytest.mark.hh
def test_of_rows(part): ...

def test_of_something_else(part): ...
"""


@pytest.mark.parametrize(("where", "told"), [({}, "3 skipped"), ({"CI": "true"}, "2 skipped, 1 error")])
def test_a_skipped_test_of_a_part_that_ci_has_fails_there(tmp_path: Path, where: dict[str, str], told: str) -> None:
    (tmp_path / "test_parts.py").write_text(SKIPPED)
    env = {name: value for name, value in clean_environment().items() if name != "CI"}
    env |= {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}", **where}
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-c", str(ROOT / "pyproject.toml")]
    done = subprocess.run([*argv, str(tmp_path)], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told in done.stdout, done.stdout + done.stderr
