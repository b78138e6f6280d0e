"""Word of another reward model to a run: `python -m pipeline.serve --swap`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.data.tokens import end_id, load_tokenizer, same_vocabulary
from pipeline.errors import UserError
from pipeline.run import reward_models
from pipeline.run.directory import RunDir
from pipeline.run.reward_models import RewardModel
from pipeline.serving.client import Published
from pipeline.serving.model_store import Manifest, model_folder, read_manifest
from pipeline.serving.texts import present_model

Say = Callable[[str], None]

_ROOM_S = 120.0
"""How much longer than a start it may take until a server has room: one that nobody uses any more ends first."""


def announce(run: RunDir, config: Config, store: Path, alone: bool, say: Say) -> None:
    """Tell the run's servers and training of a store to change to; returns when it is served.

    UserError when the store does not fit the run, or cannot be served: the run then stays with its model.
    """
    manifest = read_manifest(store)
    _check_fits(run, config, store, manifest)
    published = Published(run, None)
    model = reward_models.announce(run, manifest.identity, store.resolve(), alone)
    name = f"reward model {manifest.identity[:12]}"
    if not published.alive():
        say(f"{name} is announced; no server runs: the next one serves it, and a training changes at its next phase")
        return
    say(f"{name} is announced; waiting for its server")
    if alone and reward_models.in_use(run) is not None:
        say("it starts when the training ends its phase")
        return
    _wait_for(run, model, config.serving.start_timeout_s)
    say(f"{name} is served; a training changes at its next phase")


def _check_fits(run: RunDir, config: Config, store: Path, manifest: Manifest) -> None:
    if manifest.identity == reward_models.expected(run):
        raise UserError(f"{store}: this is the reward model that {run.root} uses already")
    if manifest.max_length < config.serving.max_length:
        raise UserError(
            f"{store}: scores at most {manifest.max_length} tokens, but the run's serving.max_length is "
            f"{config.serving.max_length}; convert it with that"
        )
    if manifest.dtype != config.serving.dtype:
        raise UserError(
            f"{store}: computes in {manifest.dtype}, but the run's serving.dtype is {config.serving.dtype}; "
            "convert it with that"
        )
    ours, theirs = present_model(run, config), model_folder(store, manifest.model_name)
    if not same_vocabulary(ours, theirs) or end_id(load_tokenizer(ours)) != end_id(load_tokenizer(theirs)):
        raise UserError(f"{store}: has another tokenizer than the run's reward model; only a new run can use it")


def _wait_for(run: RunDir, model: RewardModel, limit_s: float) -> None:
    servers, deadline = Published(run, model.identity), time.monotonic() + limit_s + _ROOM_S
    while not servers.alive():
        if (fault := reward_models.fault(run, model)) is not None:
            raise UserError(f"{model.store}: cannot be served: {fault}; the run stays with its model")
        if time.monotonic() > deadline:
            raise UserError(f"{model.store}: is not served within {limit_s:.0f} s; see the log of stage serve")
        time.sleep(0.2)
