"""python -m pipeline.containers.guard COMMAND ...: runs a container engine, and ends it when whoever started this ends.

Entering a user namespace makes an engine forget the signal that it would get when its parent dies (the kernel clears it
with every change of credentials), so a killed job would leave its containers running. This process keeps that signal
and passes it on to its whole session, in which the engine and what it starts are.
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
    try:
        signal.signal(signal.SIGHUP, orphaned)
        die_with_parent(sign=signal.SIGHUP)
        status = _run(argv)
    except _Orphaned:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _kill_session()
        status = 1
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


def _kill_session() -> None:
    """End all other processes of this session, also those that begin meanwhile."""
    session, deadline = os.getsid(0), time.monotonic() + _KILL_S
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
