"""Checkpoints that are whole or absent: written beside, synced, renamed, and checked before they are trusted.

checkpoints/<fingerprint>/step-00000096/   what accelerate saves (weights of the trainable part, optimiser, RNGs),
                                           state.json (everything else) and manifest.json (size, SHA-256 by file)
checkpoints/<fingerprint>/latest           link to the newest
checkpoints/<fingerprint>/metrics.jsonl    the trainer's rows; a resume drops those beyond the checkpoint
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pipeline.errors import UserError
from pipeline.run import atomic
from pipeline.run.hashing import sha256_file
from pipeline.training.ranks import Ranks

logger = logging.getLogger(__name__)

STATE = "state.json"
MANIFEST = "manifest.json"
_PREFIX = "step-"
_UNFINISHED = ".unfinished"


class Checkpoints:
    """The checkpoints of one configuration. Methods without a rank's condition are to be called by every rank."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int) -> None:
        self.folder = folder
        self._ranks = ranks
        self._keep = keep

    def save(self, accelerator: Accelerator, step: int, state: dict[str, Any]) -> None:
        """Write the checkpoint of `step`; an intact one that exists is left alone."""
        target = self.folder / f"{_PREFIX}{step:08d}"
        if self._ranks.from_first(self._ranks.first and is_intact(target)):
            return
        unfinished = target.with_name(target.name + _UNFINISHED)
        if self._ranks.first:
            shutil.rmtree(unfinished, ignore_errors=True)
            with atomic.disk_errors(unfinished):
                unfinished.mkdir(parents=True)
        self._ranks.barrier()
        try:
            with atomic.disk_errors(unfinished):
                accelerator.save_state(str(unfinished))
            self._ranks.barrier()
            if self._ranks.first:
                atomic.write_json(unfinished / STATE, {**state, "step": step, "processes": self._ranks.world})
                seal(unfinished, target)
                atomic.replace_symlink(self.folder / "latest", target)
        except UserError:
            if self._ranks.first:
                shutil.rmtree(unfinished, ignore_errors=True)  # give a full disk its space back
            raise
        if self._ranks.first:
            others = [path for path in all_checkpoints(self.folder) if path != target]
            for old in others[: max(0, len(others) - self._keep + 1)]:
                shutil.rmtree(old)
        self._ranks.barrier()

    def load(self, accelerator: Accelerator) -> dict[str, Any] | None:
        """Load the newest intact checkpoint and return its state; None where there is none."""
        found = self._ranks.from_first(self._newest() if self._ranks.first else None)
        if found is None:
            return None
        state: dict[str, Any] = atomic.read_json(found / STATE) or {}
        if state["processes"] != self._ranks.world:
            raise UserError(
                f"{found}: was written by {state['processes']} processes, but there are {self._ranks.world}; set "
                f"train.num_processes={state['processes']}, or remove {self.folder} to start again"
            )
        accelerator.load_state(str(found))
        if self._ranks.first:
            logger.info("resumed from %s", found)
        return state

    def _newest(self) -> Path | None:
        """The newest intact checkpoint. What is unfinished, and what is newer but damaged, is removed."""
        for leftover in self.folder.glob(f"*{_UNFINISHED}"):
            shutil.rmtree(leftover)
        latest = self.folder / "latest"
        for path in reversed(all_checkpoints(self.folder)):
            if is_intact(path):
                atomic.replace_symlink(latest, path)
                return path
            logger.warning("%s: damaged; removed", path)
            shutil.rmtree(path)  # else it would count as one of those to keep, and drive an intact one out
        latest.unlink(missing_ok=True)
        return None


def all_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdigit())


def seal(unfinished: Path, target: Path) -> None:
    """Write the manifest, make every file durable, and give the checkpoint its name."""
    files = sorted(path for path in unfinished.rglob("*") if path.is_file())
    names = {str(path.relative_to(unfinished)): [path.stat().st_size, sha256_file(path)] for path in files}
    with atomic.disk_errors(unfinished):
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        atomic.write_json(unfinished / MANIFEST, names)
        if target.exists():  # damaged, else `save` would have kept it
            shutil.rmtree(target)
        os.replace(unfinished, target)
    atomic.sync_directory(target.parent)


def is_intact(path: Path) -> bool:
    """Whether every file of the manifest is there with its size and its hash."""
    try:
        names = atomic.read_json(path / MANIFEST)
    except UserError:
        return False
    if not isinstance(names, dict) or STATE not in names:
        return False
    return all(
        (path / name).is_file() and (path / name).stat().st_size == size and sha256_file(path / name) == digest
        for name, (size, digest) in names.items()
    )
