"""The hub is out of reach: prefetch says so in one line, whatever its client libraries raise."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.load import dump, load_preset, resolve
from pipeline.data.hub import hub_errors, is_hub_fault
from pipeline.errors import UserError

PREFETCH = """
import sys, time
time.sleep = lambda seconds: None  # the hub's client pauses for 24 s between its tries
from pipeline.data.prefetch import main
from pipeline.errors import run_command
run_command(lambda: main(sys.argv[1:]))
"""


def prefetch(folder: Path, *overrides: str) -> tuple[int, str]:
    """Run the stage's work against a port on which nothing listens; return its exit status and last line."""
    small = ("data.demo.train=8", "data.demo.test=4")
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(dump(resolve(load_preset("demo"), [*small, *overrides])))
    online = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", PREFETCH, "--run", str(folder), "--out", str(folder / "out")],
        env={**online, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(folder / "hub"), "no_proxy": "127.0.0.1"},
        cwd=Path(__file__).parents[1],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.splitlines()[-1]


def test_a_model_behind_a_refused_port_is_one_line(tmp_path: Path) -> None:
    status, line = prefetch(tmp_path, "model.path=some/model")
    assert status == 2
    assert line.startswith("error: model.path: some/model: neither a folder nor to be had from the hub (")
    assert "Connection refused" in line and "run --stage prefetch where the hub can be reached" in line


def test_a_data_set_behind_a_refused_port_is_one_line(tmp_path: Path) -> None:
    status, line = prefetch(tmp_path, "data.source=some/pairs")
    assert status == 2
    assert line.startswith("error: data.source: some/pairs: neither a folder nor to be had from the hub (")
    assert "run --stage prefetch where the hub can be reached" in line


def test_faults_of_the_program_keep_their_traceback() -> None:
    with pytest.raises(KeyError), hub_errors("problem", "remedy"):
        raise KeyError("x")
    with pytest.raises(UserError, match=r"^problem \(two lines\); remedy$"), hub_errors("problem", "remedy"):
        raise ConnectionError("two\nlines")


def test_a_full_cache_has_a_remedy_of_its_own() -> None:
    with (
        pytest.raises(UserError, match=r"problem \(.*No space left on device.*HF_HOME"),
        hub_errors("problem", "remedy"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "cache")


def test_an_http_librarys_own_errors_are_known_by_their_home() -> None:
    own = type("TransportError", (Exception,), {"__module__": "httpx2._exceptions"})
    assert is_hub_fault(type("ConnectError", (own,), {"__module__": "elsewhere"})())
    assert not is_hub_fault(type("ConnectError", (Exception,), {"__module__": "httpx2_lookalike"})())
