"""Children never outlive us, and whole trees can be ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import procs
from pipeline.errors import UserError

TREE = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"


def eventually(condition, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


def test_a_tree_ends_whole_even_when_a_grandchild_ignores_term() -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    child = procs.spawn([sys.executable, "-c", TREE.format(child=stubborn)])
    assert eventually(lambda: len(procs.session_pids(child.pid)) == 2)
    time.sleep(0.3)  # time to ignore the signal
    status = procs.end_tree(child, grace_s=0.5)
    assert status == -signal.SIGTERM
    assert procs.session_pids(child.pid) == []


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from pipeline import procs;"
        "child = procs.spawn([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid)); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    pid = int((tmp_path / "pid").read_text())
    assert eventually(lambda: procs.process_of(pid) is None or not procs.process_of(pid).alive())


def test_marked_processes_are_found_and_ended_after_their_parents_are_gone(tmp_path: Path) -> None:
    env = {**os.environ, procs.RUN_MARK: str(tmp_path), procs.STAGE_MARK: "train"}
    daemon = "import os, time; os.setsid(); time.sleep(60)"  # escapes from its session
    subprocess.run(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {daemon!r}])"],
        env=env,
        check=True,
    )
    assert eventually(lambda: len(procs.marked_pids(tmp_path)) == 1)
    assert procs.marked_pids(tmp_path, (procs.STAGE_MARK, "sft")) == []
    assert procs.end_marked(tmp_path, (procs.STAGE_MARK, "train"), grace_s=1.0) == 1
    assert procs.marked_pids(tmp_path) == []


def test_a_recycled_pid_is_not_taken_for_the_process() -> None:
    me = procs.this_process()
    assert me.alive()
    assert not procs.ProcessId(me.host, me.pid, me.start - 1, me.boot).alive()
    assert not procs.ProcessId(me.host, me.pid, me.start, "another boot").alive()


def test_work_in_a_new_session_survives_and_its_errors_return(tmp_path: Path) -> None:
    note = tmp_path / "session"
    procs.in_new_session(lambda: print(os.getsid(0), file=note.open("w")), tmp_path / "log")
    assert int(note.read_text()) != os.getsid(0)

    def fail() -> None:
        raise UserError("no such partition")

    with pytest.raises(UserError, match=r"^no such partition$"):
        procs.in_new_session(fail, tmp_path / "log")


def test_a_missing_command_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="no-such-command: command not found"):
        procs.spawn(["no-such-command"])
    with pytest.raises(UserError, match="no-such-command: command not found"):
        procs.capture(["no-such-command"])


def test_a_process_whose_parent_is_gone_already_ends_at_once() -> None:
    """The parent may die while the child still imports, before it can ask the kernel to be killed."""
    script = "from pipeline import procs; procs.die_with_parent(); print('went on')"
    env = {**os.environ, procs.PARENT_MARK: str(os.getpid())}
    mine = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert mine.stdout == "went on\n"
    env[procs.PARENT_MARK] = "1"  # another's child
    orphan = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert (orphan.returncode, orphan.stdout) == (1, "")


def test_a_process_of_another_host_is_never_signalled() -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        known = procs.process_of(bystander.pid)
        assert known is not None
        procs.terminate(procs.ProcessId("another-host", known.pid, known.start, known.boot))
        procs.terminate(procs.ProcessId(known.host, known.pid, known.start - 1, known.boot))  # the pid was given anew
        time.sleep(0.2)
        assert bystander.poll() is None
        procs.terminate(known)
        assert bystander.wait(10) == -signal.SIGTERM
    finally:
        bystander.kill()


def test_what_runs_in_a_new_session_holds_no_pipe_of_the_caller(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys; from pathlib import Path; from pipeline import procs;"
        "procs.in_new_session(lambda: subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(5)'])"
        f" and None, Path({str(tmp_path / 'log')!r})); print('submitted')"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "submitted\n"
    assert time.monotonic() - started < 4.5  # it did not wait for the sleeper
