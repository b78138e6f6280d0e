"""Run as a program: conversions of two models in turn to one place, each killed at a later change to the disk.

    python helpers_interrupt.py MODEL MODEL OUT

Prints what was found after each as one line of JSON. A process of its own, since it forks: conversions then start at
once, with everything loaded and no threads.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline import convert
from pipeline.run import atomic
from pipeline.serving import model_store

CHANGES = {"os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
SPREAD = 10
"""So many moments before the exchange are tried."""


class Killer:
    """Counts a process's changes to the disk, and kills it at one of them."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.seen = 0
        self.exchanged = 0
        """The number of changes before the new store took the old one's place."""
        self.exchange = atomic._exchange

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        written = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or written:
            self.seen += 1
            if self.seen == self.at:
                os.kill(os.getpid(), signal.SIGKILL)

    def watch_exchange(self, one: Path, other: Path) -> bool:
        self.exchanged = self.seen
        return self.exchange(one, other)


def run(source: str, out: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        convert.main(["--checkpoint", source, "--out", str(out), "--dtype", "float32", "--max-length", "16"])


def conversion(source: str, out: Path, at: int | None = None) -> tuple[int, int] | None:
    """Convert in a child that dies at its change number `at`; return the changes in all and those before the
    exchange, or None when it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        killer = Killer(at)
        setattr(atomic, "_exchange", killer.watch_exchange)  # noqa: B010
        sys.addaudithook(killer)
        run(source, out)
        os.write(writer, json.dumps([killer.seen, killer.exchanged]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (not text), status
    return tuple(json.loads(text)) if text else None


def identity(store: Path) -> str:
    """The identity of a store, of which nothing is missing or another's."""
    manifest = model_store.read_manifest(store)
    folder = model_store.model_folder(store, manifest.model_name)
    assert model_store.weights_sha256(folder) == manifest.weights_sha256
    assert model_store.tokenizer_sha256(folder) == manifest.tokenizer_sha256
    assert manifest.identity in (store / manifest.model_name / "config.pbtxt").read_text()
    assert {path.name for path in folder.parent.iterdir()} >= {"model.py", "scoring.py", "reward_model"}
    return manifest.identity


def leftovers(out: Path) -> list[Path]:
    return [path for path in out.parent.iterdir() if path != out]


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def main() -> None:
    sources, out = sys.argv[1:3], Path(sys.argv[3])
    torch.set_num_threads(1)
    run(sources[0], out)
    identities = [identity(out)]
    changes = conversion(sources[1], out)
    identities.append(identity(out))
    assert changes is not None
    total, exchange = changes
    kills = []
    for moment in [*range(1, exchange, max(1, exchange // SPREAD)), exchange, exchange + 1, exchange + 5, total]:
        for path in leftovers(out):  # so that the next one does just the same as the first
            remove(path)
        before = identity(out)
        wanted = 1 - identities.index(before)
        ended = conversion(sources[wanted], out, moment)
        left = [path.name for path in leftovers(out)]
        kills.append({"at": moment, "killed": ended is None, "replaced": identity(out) != before, "left": left})
        assert identity(out) in (before, identities[wanted])
    conversion(sources[0], out)
    print(json.dumps({"total": total, "exchange": exchange, "identities": identities, "kills": kills}))


if __name__ == "__main__":
    main()
