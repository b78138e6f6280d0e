"""python -m pipeline.sync RUN: send what Weights & Biases wrote offline, from where the internet can be reached."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import procs
from pipeline.config.load import read_config
from pipeline.errors import UserError, run_command
from pipeline.run import atomic
from pipeline.run.directory import RunDir
from pipeline.run.lock import lock
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.state import resolve
from pipeline.stages.surroundings import proxy_variables
from pipeline.status import open_run

SENT = "sent.json"
"""In the tracker's folder: bytes of each segment's file when it was sent."""
_QUIET_S = 120.0
"""A file of a training that no job is known of is taken for finished when it has not grown for so long."""


@dataclass(frozen=True)
class Segment:
    """One segment of a training, from a start to a stop, as wandb left it on disk."""

    folder: Path
    file: Path

    @property
    def size(self) -> int:
        return self.file.stat().st_size

    @property
    def marked(self) -> bool:
        """Whether wandb itself says that it has sent it."""
        return self.file.with_name(self.file.name + ".synced").exists()

    @property
    def identity(self) -> str:
        """The run's id on the server."""
        return self.file.stem.removeprefix("run-")


def segments(run: RunDir) -> list[Segment]:
    """The offline segments of all trainings of the run, oldest first."""
    found = []
    for folder in sorted((run.tracker / "wandb").glob("offline-run-*")):
        found += [Segment(folder, file) for file in sorted(folder.glob("run-*.wandb"))]
    return found


def unsent(run: RunDir) -> tuple[list[Segment], Segment | None]:
    """(segments to send, the one that is still being written or None).

    wandb appends what it sends to the run: a segment that were sent in part and again would show its rows twice, so
    one that still grows is left for a later call.
    """
    sent = atomic.read_json(run.tracker / SENT) or {}
    everything = segments(run)
    growing = everything[-1] if everything and _writes(run, everything[-1]) else None
    return [each for each in everything if each.folder.name not in sent and each is not growing], growing


def _writes(run: RunDir, last: Segment) -> bool:
    submission = submissions.read(run)
    if submission is not None and submission.job_of("train") is not None:
        return not resolve(run, submission, "train").ended
    return run.outputs("train") is None and time.time() - last.file.stat().st_mtime < _QUIET_S


def sync_command(chosen: Sequence[Segment]) -> list[str]:
    """wandb's own command; it sends segments of one run in the order of their start."""
    return [sys.executable, "-m", "wandb", "sync", *(str(each.folder) for each in chosen)]


def send(run: RunDir, chosen: Sequence[Segment], timeout_s: float) -> None:
    """Send the segments and record those that arrived; UserError when one did not."""
    log = run.tracker / "sync.log"
    with log.open("wb") as output:
        child = procs.spawn(sync_command(chosen), output=output)
    try:
        child.wait(timeout_s)
        reason = ""
    except procs.WaitTimeout:
        reason = f"no end within {timeout_s:.0f} s"
    finally:
        procs.end_tree(child)
    said = _complaints(log)
    # Of a segment that was killed, wandb sends all that is whole, and says so; there will never be more of it.
    cut = [line for line in said if "incomplete record" in line]
    arrived = [each for each in chosen if each.marked or any(each.folder.name in line for line in cut)]
    record = run.tracker / SENT
    atomic.write_json(record, {**(atomic.read_json(record) or {}), **{each.folder.name: each.size for each in arrived}})
    if len(arrived) < len(chosen):
        missing = next(each for each in chosen if each not in arrived)
        reason = reason or (said or ["wandb did not say why"])[-1][:300]
        raise UserError(
            f"{len(arrived)} of {len(chosen)} segments sent, not {missing.folder.name}: {reason} (log: {log}); "
            "run it again"
        )


def _complaints(log: Path) -> list[str]:
    """What wandb calls errors."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text("utf-8", "replace"))
    lines = [line.removeprefix("wandb: ").strip() for line in plain.splitlines()]
    return [line for line in lines if re.match(r"(ERROR|Error)\b", line)]


def check_server(timeout_s: float = 20.0) -> None:
    """UserError without a key, or where wandb's server does not answer: wandb itself would try for days."""
    import wandb

    from pipeline.training.tracking import wandb_finds_a_key

    url = str(wandb.setup().settings.base_url)
    if not wandb_finds_a_key():
        raise UserError(f"Weights & Biases finds no key for {url}; run: wandb login, or set WANDB_API_KEY")
    try:
        with urllib.request.urlopen(url, timeout=timeout_s):
            pass
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise UserError(f"{url}: cannot be reached from here ({reason}); run it where the internet is") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.sync", description="Send a run's offline Weights & Biases data."
    )
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--dry-run", action="store_true", help="list what would be sent; send nothing")
    parser.add_argument("--timeout", type=float, default=3600.0, metavar="S", help="give up after (default: 3600)")
    arguments = parser.parse_args(argv)
    run = open_run(arguments.run)
    name = os.path.relpath(run.root)
    if arguments.dry_run:
        _say(name, "would send", *unsent(run))
        return 0
    with lock(run.root / "control" / "sync.lock", "sending to Weights & Biases"):
        chosen, growing = unsent(run)
        _say(name, "sending", chosen, growing)
        if not chosen:
            return 0
        proxy = read_config(run.root).cluster.proxy
        if proxy:
            os.environ.update(proxy_variables(proxy, os.environ))
        os.environ["WANDB_DIR"] = str(run.tracker)  # for logs of its own
        os.environ.pop("WANDB_MODE", None)  # a shell that keeps trainings offline means those
        check_server()
        send(run, chosen, arguments.timeout)
    print(f"{name}: sent")
    return 0


def _say(name: str, verb: str, chosen: Sequence[Segment], growing: Segment | None) -> None:
    for each in chosen:
        print(f"{name}: {verb} {each.folder.name} ({each.size} bytes) to run {each.identity}", flush=True)
    if growing is not None:
        print(f"{name}: {growing.folder.name} is still being written; a later call sends it")
    elif not chosen:
        print(f"{name}: nothing to send")


if __name__ == "__main__":
    run_command(main)
