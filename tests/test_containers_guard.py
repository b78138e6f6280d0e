"""What a container engine started ends with the process that wanted it, though the engine forgets to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from helpers_jobs import wait_for

from pipeline import procs
from pipeline.containers.command import guarded

FORGETFUL = """
import ctypes, os, sys, time
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # as an engine that enters a user namespace
child = os.fork()
open(sys.argv[1] + ("/inner" if child == 0 else "/outer"), "w").write(str(os.getpid()))
time.sleep(600)
"""
STARTER = """
import sys, time
from pathlib import Path
from pipeline import procs
procs.spawn(sys.argv[1:])
time.sleep(600)
"""


def alive(pid: int) -> bool:
    process = procs.process_of(pid)
    return process is not None and process.alive()


def test_a_killed_starter_takes_the_engine_and_its_container_along(tmp_path: Path) -> None:
    engine = guarded([sys.executable, "-c", FORGETFUL, str(tmp_path)])
    starter = subprocess.Popen([sys.executable, "-c", STARTER, *engine])
    pids = []
    for name in ("outer", "inner"):
        wait_for(lambda name=name: (tmp_path / name).exists() and (tmp_path / name).read_text(), name, 30)  # type: ignore[misc]
        pids.append(int((tmp_path / name).read_text()))
    assert all(map(alive, pids))
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    wait_for(lambda: not any(map(alive, pids)), "engine and container to end", 10)


def test_a_guard_that_is_killed_itself_is_no_way_out(tmp_path: Path) -> None:
    guard = procs.spawn(guarded([sys.executable, "-c", FORGETFUL, str(tmp_path)]))
    for name in ("outer", "inner"):
        wait_for(lambda name=name: (tmp_path / name).exists() and (tmp_path / name).read_text(), name, 30)  # type: ignore[misc]
    pids = [int((tmp_path / name).read_text()) for name in ("outer", "inner")]
    os.kill(guard.pid, signal.SIGKILL)
    guard.wait()
    wait_for(lambda: not any(map(alive, pids)), "engine and container to end", 10)


def test_the_engines_exit_status_and_signal_are_the_guards() -> None:
    for script, status in (("import sys; sys.exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9)):
        assert procs.spawn(guarded([sys.executable, "-c", script])).wait() == status


def test_a_term_to_all_is_the_engines_to_answer(tmp_path: Path) -> None:
    script = "import signal, sys, time; from pathlib import Path; signal.signal(15, lambda *_: sys.exit(75))\n"
    script += "Path(sys.argv[1]).write_text('x'); time.sleep(600)"
    process = procs.spawn(guarded([sys.executable, "-c", script, str(tmp_path / "ready")]))
    wait_for((tmp_path / "ready").exists, "the engine", 30)
    os.killpg(process.pid, signal.SIGTERM)
    started = time.monotonic()
    assert process.wait(30) == 75
    assert time.monotonic() - started < 10


def test_an_engine_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        status = procs.spawn(guarded(["no-such-engine", "exec"]), output=log).wait()
    assert (status, (tmp_path / "log").read_text()) == (127, "error: no-such-engine: No such file or directory\n")
