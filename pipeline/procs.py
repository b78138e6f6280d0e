"""The one module that touches subprocess and signals: children that never outlive us, trees that end whole.

Every process of a run inherits RUN_MARK in its environment, so that a tree can be found again, and ended, even
after its parents are gone. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

from pipeline.errors import UserError

RUN_MARK = "HH_PIPELINE_RUN"
"""Environment variable with the run directory's absolute path, in every process of a run."""
STAGE_MARK = "HH_PIPELINE_STAGE"
"""Environment variable with the job's stages, joined by "+"."""
ATTEMPT_MARK = "HH_PIPELINE_ATTEMPT"
"""Environment variable with the attempt's folder, in every process of a stage's work."""
PARENT_MARK = "HH_PIPELINE_PARENT"
"""Environment variable with the pid of the process that started this one and must outlive it."""

Child: TypeAlias = "subprocess.Popen[bytes]"
"""A process that `spawn` started."""
WaitTimeout = subprocess.TimeoutExpired
"""Raised by `Child.wait` when the time is over."""


class NoAnswer(UserError):
    """A short command took too long: what it was asked is not known."""


_PR_SET_PDEATHSIG = 1
_KILL_S = 15.0
"""Seconds in which a killed process must be gone."""
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int | None = None, sign: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel kill this process when the thread that started it ends; exit at once where it has ended already.

    `parent` is that process's pid; by default what PARENT_MARK says. `sign` is sent in place of SIGKILL. Call it before
    anything that takes time.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, int(sign), 0, 0, 0)
    expected = parent if parent is not None else int(os.environ.get(PARENT_MARK, "0"))
    if expected and os.getppid() != expected:
        os._exit(1)


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    output: IO[bytes] | int | None = None,
) -> Child:
    """Start `argv` in a session of its own; it is killed when this process's main thread dies.

    USR1 and USR2 do not end it: on some sites Slurm's warning before a time limit reaches every process of a job.
    Call it from the main thread: the parent-death signal follows the thread, not the process.
    """
    parent = os.getpid()
    marked = {**(os.environ if env is None else env), PARENT_MARK: str(parent)}

    def bind_to_parent() -> None:
        die_with_parent(parent)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)

    try:
        return subprocess.Popen(
            list(argv),
            env=marked,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            start_new_session=True,
            # Safe beside threads: it only calls prctl, getppid and sigaction, and allocates nothing that needs a lock.
            preexec_fn=bind_to_parent,  # noqa: PLW1509
        )
    except FileNotFoundError:
        raise UserError(f"{argv[0]}: command not found; install it or put it on PATH") from None


def capture(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float = 60.0, told: str = ""
) -> tuple[int, str]:
    """Run a short command; return its exit status and what it printed (stdout and stderr together).

    `told` is what it finds on its standard input.
    """
    try:
        done = subprocess.run(
            list(argv),
            env=dict(env) if env is not None else None,
            input=told.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError:
        raise UserError(f"{argv[0]}: command not found; install it or put it on PATH") from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{argv[0]}: no answer within {timeout_s:.0f} s") from None
    return done.returncode, done.stdout.decode("utf-8", "replace")


def end_tree(process: Child, grace_s: float = 10.0) -> int:
    """End a spawned process and its whole session: TERM, `grace_s` seconds, then KILL. Returns its exit status."""
    session = process.pid
    if process.poll() is None:
        _signal_group(session, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    deadline = time.monotonic() + (grace_s if process.returncode is not None else 0.0)
    while session_pids(session) and time.monotonic() < deadline:
        time.sleep(0.02)
    deadline = time.monotonic() + _KILL_S
    while (left := session_pids(session)) and time.monotonic() < deadline:  # the dying take a moment, and may fork
        for pid in left:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.005)
    return process.wait()


def session_pids(session: int) -> list[int]:
    """Live processes of a session; zombies do not count."""
    return [stat.pid for stat in _all_stats() if stat.session == session and stat.state != "Z"]


@dataclass(frozen=True)
class ProcessId:
    """A process that can be recognised later, even after its pid was given to another."""

    host: str
    pid: int
    start: int
    """Clock ticks since boot, from /proc/<pid>/stat."""
    boot: str

    @property
    def here(self) -> bool:
        """Whether it is a process of this host, and so one that can be looked at and signalled."""
        return self.host == os.uname().nodename

    def alive(self) -> bool:
        """Whether the process still runs. Only known for processes of this host; of others: True."""
        if not self.here:
            return True
        stat = _stat(self.pid)
        return self.boot == boot_id() and stat is not None and stat.start == self.start and stat.state != "Z"


def this_process() -> ProcessId:
    """The calling process's identity."""
    stat = _stat(os.getpid())
    assert stat is not None
    return ProcessId(os.uname().nodename, stat.pid, stat.start, boot_id())


def process_of(pid: int) -> ProcessId | None:
    """The identity of a process of this machine, or None when it is gone."""
    stat = _stat(pid)
    return ProcessId(os.uname().nodename, pid, stat.start, boot_id()) if stat is not None else None


def boot_id() -> str:
    """Identifies this boot of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


Tick: TypeAlias = Callable[[], None]
"""Called a few times a second while a child is waited for."""

Mark: TypeAlias = tuple[str, str]
"""The name and value of an environment variable that marks processes."""


def marked_pids(run: Path, mark: Mark | None = None) -> list[int]:
    """Live processes, except this one and its ancestors, that carry the run's mark (and a further one)."""
    wanted = {f"{RUN_MARK}={run}".encode()}
    if mark is not None:
        wanted.add("=".join(mark).encode())
    spared = _ancestors()
    found = []
    for stat in _all_stats():
        if stat.pid in spared or stat.state == "Z":
            continue
        with contextlib.suppress(OSError):
            if wanted <= set(Path(f"/proc/{stat.pid}/environ").read_bytes().split(b"\0")):
                found.append(stat.pid)
    return found


def end_marked(run: Path, mark: Mark | None = None, grace_s: float = 10.0) -> int:
    """End every process that carries the mark: TERM, grace, then KILL until none is left. Returns how many.

    UserError when one survives even that (it hangs in the kernel, as on a file system that does not answer).
    """
    first = marked_pids(run, mark)
    for pid in first:
        _signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while (left := marked_pids(run, mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    deadline = time.monotonic() + _KILL_S
    while left:  # a process may fork between two looks
        if time.monotonic() > deadline:
            raise UserError(f"{run}: processes {left} do not end even when killed; look at them with ps")
        for pid in left:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.05)
        left = marked_pids(run, mark)
    return len(first)


def terminate(process: ProcessId) -> None:
    """Ask a process to end (SIGTERM); nothing happens when it is gone, or not of this host."""
    if process.here and process.alive():
        _signal(process.pid, signal.SIGTERM)


def in_new_session(work: Callable[[], None], log: Path) -> None:
    """Run `work` in a forked child with a session of its own, so that what it starts survives our Ctrl-C and exit.

    What it and its children print goes to `log`: none of them holds the caller's terminal or pipe open. A Ctrl-C
    before it is through is a KeyboardInterrupt in `work` too, which can undo what it has done.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        os.setsid()
        status = 0
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _redirect(log)
            work()
        except BaseException as error:  # reported to the parent, which raises
            os.write(write_end, f"{type(error).__name__}: {error}".encode())
            status = 1
        os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end, "rb", closefd=True) as pipe:
        # Processes that `work` left running hold no copy of the pipe: descriptors are not inheritable.
        try:
            message = pipe.read().decode("utf-8", "replace")
        except KeyboardInterrupt:
            _signal(child, signal.SIGINT)
            pipe.read()
            os.waitpid(child, 0)
            raise
    os.waitpid(child, 0)
    if message:
        kind, _, text = message.partition(": ")
        raise UserError(text) if kind == "UserError" else RuntimeError(message)


def _redirect(log: Path) -> None:
    """Point this process's standard input at nothing and its outputs at `log`."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, target)


@dataclass(frozen=True)
class _Stat:
    pid: int
    state: str
    parent: int
    session: int
    start: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # the last with hidepid: not one of ours
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name may hold spaces and parentheses
    return _Stat(pid, fields[0], int(fields[1]), int(fields[3]), int(fields[19]))


def _all_stats() -> Iterator[_Stat]:
    for name in os.listdir("/proc"):
        if name.isdigit() and (stat := _stat(int(name))) is not None:
            yield stat


def _ancestors() -> set[int]:
    pids, pid = set(), os.getpid()
    while pid > 1 and (stat := _stat(pid)) is not None:
        pids.add(pid)
        pid = stat.parent
    return pids


def _signal(pid: int, sig: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, sig)


def _signal_group(group: int, sig: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, sig)
