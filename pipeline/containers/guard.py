"""python -m pipeline.containers.guard COMMAND ...: runs a container engine, and ends it when whoever started this ends.

Entering a user namespace makes an engine forget the signal that it would get when its parent dies (the kernel clears it
with every change of credentials), so a killed job would leave its containers running. This process keeps that signal
and passes it on to its whole session, in which the engine and what it starts are. Where it is killed itself, by whoever
kills a job process by process, a second process notices that and does the same.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from types import FrameType

from pipeline.containers import docker
from pipeline.errors import UserError, run_command
from pipeline.procs import die_with_parent, session_pids

_KILL_S = 30.0
_LEFT_TO_CHILD = (signal.SIGTERM, signal.SIGINT)
"""Sent to the whole session: the engine answers them, and its end is ours."""


class _Orphaned(BaseException):
    """The process that started this one is gone."""


def main(argv: list[str]) -> int:
    """Run `argv`; returns its exit status, or dies of the signal that it died of."""

    def orphaned(number: int, frame: FrameType | None) -> None:
        raise _Orphaned

    if not argv:
        raise UserError("usage: python -m pipeline.containers.guard COMMAND ...")
    container = docker.name_in(argv)
    ended_well = _second(os.getpid()) if os.getsid(0) == os.getpid() else None  # else others are in the session, too
    try:
        signal.signal(signal.SIGHUP, orphaned)
        die_with_parent(sign=signal.SIGHUP)
        status = _run(argv)
    except _Orphaned:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _kill_session(os.getsid(0))
        status = 1
    if ended_well is not None:
        os.write(ended_well, b".")
    if container is not None:  # the daemon's, which knows nothing of our sessions
        docker.remove(container)
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def _run(argv: list[str]) -> int:
    """Start the command in this session and wait for it: its exit status, or minus its signal."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        try:
            os.execvp(argv[0], argv)
        except OSError as error:
            os.write(2, f"error: {argv[0]}: {error.strerror}\n".encode())
        os._exit(127)
    for number in _LEFT_TO_CHILD:
        signal.signal(number, signal.SIG_IGN)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _second(session: int) -> int:
    """Start the second process; returns what to write to when all has ended well.

    It is nobody's child and in a session of its own: what ends this process with its tree does not find it.
    """
    reading, writing = os.pipe()  # closed in the engine; here, when this process ends, however it does
    child = os.fork()
    if child == 0:
        if os.fork() == 0:
            os.setsid()
            os.close(writing)
            if not os.read(reading, 1):
                _kill_session(session)
        os._exit(0)
    os.close(reading)
    os.waitpid(child, 0)
    return writing


def _kill_session(session: int) -> None:
    """End all other processes of a session, also those that begin meanwhile."""
    deadline = time.monotonic() + _KILL_S
    while left := [pid for pid in session_pids(session) if pid != os.getpid()]:
        if time.monotonic() > deadline:  # one hangs in the kernel: nothing can be done about it
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        time.sleep(0.02)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
