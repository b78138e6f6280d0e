"""Several processes, one voice: errors are said once, and nobody outlives the process that started it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.procs import PARENT_MARK, capture
from pipeline.resources import resource_dir
from pipeline.training.report_once import SAID, first_to_say, run_rank, shared_folder

COMMANDS = [
    *(f"pipeline.training.{name}" for name in ("ppo", "sft", "reward_model", "launch")),
    "pipeline.evaluation.evaluate",
]


def test_each_line_is_said_by_the_first_that_has_it() -> None:
    with shared_folder():
        assert [first_to_say(line) for line in ("disk full", "disk full", "mine alone", "disk full")] == [
            True, False, True, False,
        ]  # fmt: skip
    assert SAID not in os.environ
    assert first_to_say("disk full") and first_to_say("disk full")  # without a launcher nobody else would say it


def test_a_silent_rank_fails_with_the_same_status(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("data/train.jsonl: no rows; fill it")

    with shared_folder():
        for _ in range(3):
            with pytest.raises(SystemExit) as ended:
                run_rank(fail)
            assert ended.value.code == 2
    assert capsys.readouterr().err == "error: data/train.jsonl: no rows; fill it\n"


ONE_KNOWS = """
import os
import socket
import sys
import time
from pipeline.errors import UserError
from pipeline.training.report_once import run_rank
def main():
    connection = socket.socket(socket.AF_UNIX)
    if os.environ["RANK"] == "0":
        connection.bind(sys.argv[1])
        connection.listen()
        peer, _ = connection.accept()
        peer.recv(1)  # returns when the peer's process is gone
        raise RuntimeError("connection closed by peer")
    while connection.connect_ex(sys.argv[1]):
        time.sleep(0.05)
    globals()["held"] = connection
    raise UserError("only rank 1 saw it; look there")
if __name__ == "__main__":
    run_rank(main)
"""


def test_the_rank_that_knows_the_cause_decides_line_and_status(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ONE_KNOWS)
    config = str(resource_dir("accelerate") / "ddp-cpu.yaml")
    launch = [sys.executable, "-m", "pipeline.training.launch", "--config_file", config, "--num_processes", "2"]
    status, said = capture(
        [*launch, str(script), str(tmp_path / "peer")], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout_s=120
    )
    assert status == 2, said
    assert said.count("error: only rank 1 saw it; look there") == 1


@pytest.mark.parametrize("module", COMMANDS)
def test_a_command_whose_parent_is_gone_ends_before_it_loads_anything(module: str) -> None:
    started = time.monotonic()
    status, said = capture([sys.executable, "-m", module, "--help"], env={**os.environ, PARENT_MARK: "1"})
    assert (status, said) == (1, "")
    assert time.monotonic() - started < 2.0  # torch and transformers alone take longer to load


def test_a_rank_that_ended_well_leaves_without_the_interpreters_end() -> None:
    """What it printed is there; what runs at the interpreter's end, as torch's threads' destruction does, is not."""
    script = (
        "import atexit, os; from pipeline.training.report_once import run_rank\n"
        "atexit.register(lambda: os.abort())\n"
        "def main():\n    print('all is written')\n    return 75\n"
        "run_rank(main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "RANK": "1"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (75, "all is written\n")
