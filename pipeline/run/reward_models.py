"""Which reward model a run is to use: the one that it converted, until another one is announced.

services/reward-models/0001.json       an announced model store; the highest number counts
services/reward-models/0001.fault      why it could not be served: it does not count
services/in-use.json                   which model the training that runs is scored by; renewed while it runs

The server starts an announced model beside the earlier one; a training changes over between two phases. Files are
only ever added, so that servers, trainings and commands need no lock.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.run import atomic
from pipeline.run.directory import RunDir

RENEW_S = 30.0
"""A training says so often which model it is scored by."""
EXPIRES_S = 300.0
"""One that has not said so for as long was killed, or lost with its node."""


@dataclass(frozen=True)
class RewardModel:
    """A model store that was announced."""

    identity: str
    """The store's, as its manifest says."""
    store: str
    """Its absolute path."""
    base: str
    """Identity of what the run had converted then: another conversion makes the announcement void."""
    alone: bool = False
    """Whether the earlier server ends before this one starts: where two models do not fit."""
    time: float = 0.0
    number: int = 0


def announce(run: RunDir, identity: str, store: Path, alone: bool = False) -> RewardModel:
    """Announce a store; the run's servers and its training take it up."""
    atomic.private_folder(run.endpoint.parent)
    number = max((int(path.stem) for path in _files(run)), default=0)
    while True:
        number += 1
        model = RewardModel(identity, str(store), _converted(run), alone, time.time(), number)
        if atomic.create_json(_folder(run) / f"{number:04d}.json", asdict(model)):
            return model


def announced(run: RunDir, identity: str | None = None) -> RewardModel | None:
    """The announcement that counts, or the latest one of a given model; None where there is none."""
    for path in reversed(_files(run)):
        model = RewardModel(**(atomic.read_json(path) or {}))
        counts = model.base == _converted(run) and fault(run, model) is None
        if counts and identity in (None, model.identity):
            return model
    return None


def expected(run: RunDir) -> str | None:
    """The identity of the reward model that the run is to use; None where it has none with an identity."""
    model = announced(run)
    return model.identity if model is not None else _converted(run) or None


def store_of(run: RunDir, identity: str | None = None) -> Path:
    """The model store that the run is to use, or that of an announced model; UserError when it is not there."""
    model = announced(run) if identity is None else announced(run, identity)
    if model is None:
        return run.artifact("convert", "model_store")
    store = Path(model.store)
    if not store.is_dir():
        raise UserError(f"{store}: the announced model store is gone; bring it back, or announce another")
    return store


def fail(run: RunDir, model: RewardModel, reason: str) -> None:
    """Say that an announced model cannot be served; the one before it counts again."""
    atomic.write_text(_fault_file(run, model), f"{reason}\n", mode=0o600)


def fault(run: RunDir, model: RewardModel) -> str | None:
    """Why an announced model could not be served; None when nothing is wrong with it."""
    path = _fault_file(run, model)
    return path.read_text("utf-8").strip() if path.exists() else None


def use(run: RunDir, identity: str | None) -> None:
    """Say that the training is scored by a model: its server is needed, and no other. To be renewed."""
    atomic.private_folder(run.endpoint.parent)
    atomic.write_json(_in_use(run), {"identity": identity, "time": time.time()}, mode=0o600)


def release(run: RunDir) -> None:
    """Say that the training is over, or stops for now."""
    _in_use(run).unlink(missing_ok=True)


def in_use(run: RunDir) -> str | None:
    """The identity of the model that the training is scored by; None without a training that lives."""
    said = atomic.read_json(_in_use(run))
    return said["identity"] if said is not None and time.time() - said["time"] < EXPIRES_S else None


def _converted(run: RunDir) -> str:
    return str(run.values("convert").get("identity") or "")


def _folder(run: RunDir) -> Path:
    return run.endpoint.parent / "reward-models"


def _files(run: RunDir) -> list[Path]:
    return sorted(_folder(run).glob("[0-9]*.json"))


def _fault_file(run: RunDir, model: RewardModel) -> Path:
    return _folder(run) / f"{model.number:04d}.fault"


def _in_use(run: RunDir) -> Path:
    return run.endpoint.parent / "in-use.json"
