"""Running things as an ordinary user where the tests run as root: as a cluster's users do, and as Apptainer needs it.

A root's checkout and interpreter often lie in folders that only root may enter (/root). What the user needs of them is
shown to its processes, read-only, in a mount namespace of their own; nothing changes for anybody else.
"""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NAME = "hh-user"
"""The user that .ci/apptainer makes."""
ROOT = Path(__file__).resolve().parents[2]
_KEPT = ("LANG", "LC_ALL", "PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "TZ")
"""What of root's environment a user's shell has as well; all else is set anew."""


def missing_user() -> str | None:
    """Why nothing can be run as an ordinary user here; None when it can."""
    if os.getuid() != 0:
        return None
    if shutil.which("unshare") is None or shutil.which("setpriv") is None:
        return "not installed: unshare and setpriv (package util-linux)"
    try:
        pwd.getpwnam(NAME)
    except KeyError:
        return f"the tests run as root, and there is no user {NAME}; .ci/apptainer makes it"
    return None


@dataclass(frozen=True)
class OrdinaryUser:
    """A user and how to be it. Where the tests run as an ordinary user, it is that one, and nothing is switched."""

    name: str
    uid: int
    gid: int
    home: Path

    @classmethod
    def find(cls) -> OrdinaryUser:
        """The user of this machine's tests."""
        entry = pwd.getpwnam(NAME) if os.getuid() == 0 else pwd.getpwuid(os.getuid())
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))

    @property
    def switched(self) -> bool:
        """Whether it is another one than the tests' own."""
        return self.uid != os.getuid()

    def argv(self, argv: Sequence[object]) -> list[str]:
        """The command that runs `argv` as the user, in the same process: no shell or supervisor stays around it."""
        words = [str(word) for word in argv]
        if not self.switched:
            return words
        become = ["setpriv", f"--reuid={self.uid}", f"--regid={self.gid}", "--init-groups", "--inh-caps=-all"]
        script = _mounts(self._needed(), self._may_enter)
        if not script:
            return [*become, *words]
        return ["unshare", "--mount", "--propagation=private", "sh", "-ec", f'{script}exec "$@"', "sh", *become, *words]

    def environment(self, **more: str) -> dict[str, str]:
        """That of the user's login shell; `more` is set too."""
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        return {**kept, "HOME": str(self.home), "USER": self.name, "LOGNAME": self.name, "SHELL": "/bin/bash", **more}

    def run(
        self, *argv: object, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout_s: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; its output is captured, its status is for the caller to look at."""
        return subprocess.run(
            self.argv(argv), env=dict(self.environment() if env is None else env), cwd=cwd or self.home,
            capture_output=True, text=True, check=False, timeout=timeout_s, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def start(
        self, *argv: object, log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own; it may be killed by its pid, which is the command's own."""
        with log.open("ab") as output:
            return subprocess.Popen(
                self.argv(argv), env=dict(self.environment() if env is None else env), cwd=cwd or self.home,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def folder(self, prefix: str) -> Path:
        """A new folder of the user's, in its home: pytest's own folders are closed to other users."""
        folder = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=self.home))
        self.own(folder)
        return folder

    def own(self, folder: Path) -> None:
        """Give the user a folder with all that is in it."""
        if not self.switched:
            return
        for path in (folder, *folder.rglob("*")):
            os.chown(path, self.uid, self.gid, follow_symlinks=False)

    def _needed(self) -> list[Path]:
        """The interpreter, its packages and the checkout."""
        environment = Path(sys.prefix).resolve()
        return sorted({Path(sys.base_prefix).resolve(), environment, ROOT})

    def _may_enter(self, folder: Path) -> bool:
        state = folder.stat()
        if state.st_uid == self.uid:
            return bool(state.st_mode & 0o100)
        return bool(state.st_mode & (0o010 if state.st_gid == self.gid else 0o001))


def remove(folder: Path) -> None:
    """Remove a folder in which an image was unpacked: some of its folders may not be writable."""
    subprocess.run(["chmod", "-R", "u+rwX", str(folder)], check=False, capture_output=True)
    shutil.rmtree(folder)


def _mounts(needed: Sequence[Path], may_enter: Callable[[Path], bool]) -> str:
    """Shell commands that show `needed` where they are, below folders that are closed to the user; none if all is open.

    Such a folder is covered with an empty one, in which only the needed ones are mounted again.
    """
    closed: dict[Path, list[Path]] = {}
    for path in needed:
        top = next((folder for folder in reversed(path.parents) if not may_enter(folder)), None)
        if top is not None:
            closed.setdefault(top, []).append(path)
    lines = []
    for top, paths in closed.items():
        held = {number: shlex.quote(str(path)) for number, path in enumerate(paths, start=4)}
        lines += [f"exec {number}<{path}" for number, path in held.items()]
        lines.append(f"mount -t tmpfs -o mode=0755,size=1m tmpfs {shlex.quote(str(top))}")
        for number, path in held.items():
            lines.append(f"mkdir -p {path}")
            lines.append(f"mount --no-canonicalize --bind /proc/self/fd/{number} {path}")  # what is covered by now
            lines.append(f"mount -o remount,bind,ro {path}")
            lines.append(f"exec {number}<&-")
    return "".join(f"{line}\n" for line in lines)
