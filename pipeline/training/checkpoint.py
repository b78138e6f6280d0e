"""Checkpoints that are whole or absent: written beside, synced, renamed, and checked before they are trusted.

checkpoints/<fingerprint>/step-00000096/   weights of the trainable part, optimiser, generators; phase_<rank>.bin in the
                                           middle of a phase; state.json (everything else) and manifest.json (size,
                                           SHA-256 by file)
checkpoints/<fingerprint>/latest           link to the newest
checkpoints/<fingerprint>/best-00000048/   weights of the best held-out reward, or loss; `best` is a link to it
checkpoints/<fingerprint>/metrics.jsonl    the trainer's rows; a resume drops those beyond the checkpoint

The state is copied to host memory; writing, hashing and syncing the copy goes on in the background, if asked to.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pipeline.errors import UserError
from pipeline.run import atomic
from pipeline.training.checkpoint_files import (
    BEST,
    PREFIX,
    STATE,
    UNFINISHED,
    AbandonedError,
    all_checkpoints,
    is_intact,
    rotate,
    seal,
    write_part,
)
from pipeline.training.ranks import Ranks
from pipeline.training.snapshot import (
    Files,
    best_weights,
    can_copy,
    copies,
    load_weights,
    read_plain,
    restore,
    snapshot,
)
from pipeline.training.writer import Writer

logger = logging.getLogger(__name__)

_EXTRA = "phase_{}.bin"
_PATIENCE_S = 300.0
"""For what a training that failed was still writing."""
_AT_ONCE = 2
"""Saves whose copies may be in memory together: a checkpoint's and a best model's."""


class Checkpoints:
    """The checkpoints of one configuration. Methods without a rank's condition are to be called by every rank."""

    def __init__(
        self, folder: Path, ranks: Ranks, keep: int, background: bool = False, processes: str = "train.num_processes"
    ) -> None:
        """With `background`, `save` returns when it has its copy, and `wait` has to be called at the end.

        `processes` is the setting that says how many ranks there are.
        """
        self.folder = folder
        self._ranks = ranks
        self._keep = keep
        self._background = background
        self._processes = processes
        self._writer = Writer()
        self._abandoned = threading.Event()
        self._given = 0
        self._loaded: Path | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank's writing in the background has failed: the next save or `wait` will say so."""
        return self._writer.failed

    def save(self, accelerator: Accelerator, step: int, state: dict[str, Any], extra: Any = None) -> None:
        """Write the checkpoint of `step`; an intact one that exists is left alone.

        `extra`, plain values and tensors, is this rank's own. UserError when this or an earlier one cannot be written.
        """
        target = self.folder / f"{PREFIX}{step:08d}"
        unfinished = self._open(target)
        if unfinished is None:
            return
        files: Files = {}
        if can_copy(accelerator):
            files = snapshot(accelerator, self._ranks.rank)
        else:
            with self._cleaned(unfinished), atomic.disk_errors(unfinished):
                accelerator.save_state(str(unfinished))
            self._ranks.barrier()
        if extra is not None:
            files[_EXTRA.format(self._ranks.rank)] = copies(extra)
        self._write(target, unfinished, files, {**state, "step": step, "processes": self._ranks.world})

    def save_best(self, accelerator: Accelerator, step: int, figure: float) -> None:
        """Keep the weights as they are now as those of the best held-out `figure`, a reward or a loss."""
        target = self.folder / f"{BEST}{step:08d}"
        unfinished = self._open(target)
        if unfinished is not None:
            files = best_weights(accelerator, self._ranks.rank)
            self._write(target, unfinished, files, {"step": step, "figure": figure})

    def load(self, accelerator: Accelerator) -> dict[str, Any] | None:
        """Load the newest intact checkpoint and return its state; None where there is none."""
        self.wait()
        found = self._ranks.from_first(self._newest() if self._ranks.first else None)
        if found is None:
            return None
        state: dict[str, Any] = atomic.read_json(found / STATE) or {}
        if state["processes"] != self._ranks.world:
            raise UserError(
                f"{found}: was written by {state['processes']} processes, but there are {self._ranks.world}; set "
                f"{self._processes}={state['processes']}, or remove {self.folder} to start again"
            )
        if can_copy(accelerator):
            restore(accelerator, self._ranks.rank, found)
        else:
            accelerator.load_state(str(found))
        self._loaded = found
        if self._ranks.first:
            self._drop_best_beyond(int(state["step"]))
            logger.info("resumed from %s", found)
        return state

    def extra(self) -> Any:
        """What this rank gave `save` for the checkpoint that was loaded, on the host; None where it gave nothing."""
        path = self._loaded / _EXTRA.format(self._ranks.rank) if self._loaded else None
        return read_plain(path) if path is not None and path.exists() else None

    def load_best(self, accelerator: Accelerator, step: int) -> bool:
        """Give the models the weights that were best, at `step`; False where they are not there."""
        self.wait()
        path = self.folder / f"{BEST}{step:08d}"
        if not self._ranks.from_first(self._ranks.first and is_intact(path)):
            return False
        load_weights(accelerator, path)
        return True

    def wait(self) -> None:
        """Wait for what is being written in the background. UserError, on every rank, if any rank could not write."""
        self._given = 0
        # Rank 0 waits for the other ranks' parts, so the others come first, and tell it if a part will never come.
        error = None if self._ranks.first else self._writer.wait()
        said = [line for line in self._ranks.gather(str(error) if error else None) if line]
        if said:
            self._abandoned.set()
        if self._ranks.first:
            error = self._writer.wait()
        if isinstance(error, AbandonedError):  # the rank that failed says why
            error = None
        first = self._ranks.from_first(str(error) if error else None)
        self._abandoned.clear()
        if error is not None:
            raise error
        if said or first:
            raise UserError(first or said[0])

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """When the block fails, let this rank's writing end first: the newest checkpoint must not be lost with it."""
        try:
            yield
        except BaseException:
            self._writer.finish(_PATIENCE_S)
            raise

    def _open(self, target: Path) -> Path | None:
        """The folder to fill before it takes the place of `target`; None when that exists and is intact."""
        if self._given >= _AT_ONCE or self._ranks.any(self.failed):
            self.wait()
        if self._ranks.from_first(self._ranks.first and is_intact(target)):
            return None
        unfinished = target.with_name(target.name + UNFINISHED)
        if self._ranks.first:
            shutil.rmtree(unfinished, ignore_errors=True)
            with atomic.disk_errors(unfinished):
                unfinished.mkdir(parents=True)
        self._ranks.barrier()
        return unfinished

    def _write(self, target: Path, unfinished: Path, files: Files, state: dict[str, Any]) -> None:
        """Have a checkpoint written: every rank its files, and rank 0 the state and the name."""
        self._given += 1
        self._writer.start(lambda: self._work(target, unfinished, files, state))
        if not self._background:
            self.wait()

    def _work(self, target: Path, unfinished: Path, files: Files, state: dict[str, Any]) -> None:
        """A rank's work in the background: no collective operation, for the training has its own meanwhile."""
        if not self._ranks.first:
            try:
                write_part(unfinished, self._ranks.rank, files)
            except FileNotFoundError:
                if unfinished.exists():
                    raise
                raise AbandonedError from None  # rank 0 failed, and has removed it
            return
        with self._cleaned(unfinished):
            write_part(unfinished, self._ranks.rank, files)
            atomic.write_json(unfinished / STATE, state)
            seal(unfinished, target, self._ranks.world, self._abandoned)
            if target.name.startswith(BEST):
                atomic.replace_symlink(self.folder / "best", target)
            else:
                atomic.replace_symlink(self.folder / "latest", target)
                rotate(self.folder, target, self._keep)

    def _cleaned(self, unfinished: Path) -> _Cleaned:
        return _Cleaned(unfinished if self._ranks.first else None)

    def _drop_best_beyond(self, step: int) -> None:
        """Forget best weights that the training, resumed at `step`, has not come to yet."""
        kept = [path for path in all_checkpoints(self.folder, BEST) if int(path.name.removeprefix(BEST)) <= step]
        for path in set(all_checkpoints(self.folder, BEST)) - set(kept):
            shutil.rmtree(path)
        if kept:
            atomic.replace_symlink(self.folder / "best", kept[-1])
        else:
            (self.folder / "best").unlink(missing_ok=True)

    def _newest(self) -> Path | None:
        """The newest intact checkpoint. What is unfinished, and what is newer but damaged, is removed."""
        for leftover in self.folder.glob(f"*{UNFINISHED}"):
            shutil.rmtree(leftover)
        latest = self.folder / "latest"
        for path in reversed(all_checkpoints(self.folder)):
            if is_intact(path):
                atomic.replace_symlink(latest, path)
                return path
            logger.warning("%s: damaged; removed", path)
            shutil.rmtree(path)  # else it would count as one of those to keep, and drive an intact one out
        for path in (latest, self.folder / "best"):
            path.unlink(missing_ok=True)
        for path in all_checkpoints(self.folder, BEST):  # of a training that begins anew
            shutil.rmtree(path)
        return None


class _Cleaned:
    """Gives a full disk its space back when the block fails."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._folder is not None and isinstance(error, (UserError, AbandonedError)):
            shutil.rmtree(self._folder, ignore_errors=True)
