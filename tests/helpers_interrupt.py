"""Run as a program: conversions of two models in turn to one place, each killed at a later change to the disk.

    python helpers_interrupt.py MODEL MODEL OUT

Prints what was found after each as one line of JSON. A process of its own, since it forks: conversions then start at
once, with torch loaded and no threads.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline import convert
from pipeline.serving import convert as _loaded  # noqa: F401: what the command would import
from pipeline.serving import model_store

CHANGES = {
    "os.rename",
    "os.link",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "shutil.rmtree",
    "tempfile.mkdtemp",
}
AROUND = 9
"""The last so many changes are each tried: among them are the exchange and the removal of the old store."""
BEFORE = 9
"""So many of those before are tried, evenly spaced."""


class Killer:
    """Counts a process's changes to the disk, and kills it at one of them."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.seen = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        written = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or written:
            self.seen += 1
            if self.seen == self.at:
                os.kill(os.getpid(), signal.SIGKILL)


def conversion(source: str, out: Path, at: int | None = None) -> int:
    """Convert in a child that dies at its change number `at`; return its changes, or -1 when it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        killer = Killer(at)
        sys.addaudithook(killer)
        with contextlib.redirect_stdout(io.StringIO()):
            convert.main(["--checkpoint", source, "--out", str(out), "--dtype", "float32", "--max-length", "16"])
        os.write(writer, str(killer.seen).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (not text), status
    return int(text or -1)


def identity(store: Path) -> str:
    """The identity of a store, of which nothing is missing or another's."""
    manifest = model_store.read_manifest(store)
    folder = model_store.model_folder(store, manifest.model_name)
    assert model_store.weights_sha256(folder) == manifest.weights_sha256
    assert model_store.tokenizer_sha256(folder) == manifest.tokenizer_sha256
    assert manifest.identity in (store / manifest.model_name / "config.pbtxt").read_text()
    assert {path.name for path in folder.parent.iterdir()} >= {"model.py", "scoring.py", "reward_model"}
    return manifest.identity


def main() -> None:
    sources, out = sys.argv[1:3], Path(sys.argv[3])
    torch.set_num_threads(1)
    changes, identities = [], []
    for source in sources:
        changes.append(conversion(source, out))
        identities.append(identity(out))
    total = changes[1]  # the second one replaced a store
    moments = [1 + number * (total - AROUND) // BEFORE for number in range(BEFORE)]
    moments += range(total - AROUND, total + 1)
    kills = []
    for number, moment in enumerate(moments):
        before = identity(out)
        wanted = number % 2
        ended = conversion(sources[wanted], out, moment)
        left = sum(path.name.startswith(".") for path in out.parent.iterdir())
        found = identity(out)
        kills.append(
            {"at": moment, "ended": ended, "before": before, "wanted": identities[wanted], "found": found, "left": left}
        )
    conversion(sources[0], out)
    print(json.dumps({"changes": changes, "identities": identities, "kills": kills}))


if __name__ == "__main__":
    main()
