"""What `python -m pipeline.serve` does: a server until one is told to stop, or word of a new model to a run."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from pipeline.config.load import check, dump, merge, parse_override, read_config
from pipeline.config.schema import Config
from pipeline.data.tokens import end_id, load_tokenizer, same_vocabulary
from pipeline.errors import UserError
from pipeline.run import atomic, endpoint, reward_models
from pipeline.run.directory import Artifact, Outputs, RunDir
from pipeline.run.reward_models import RewardModel
from pipeline.serving.client import Published
from pipeline.serving.model_store import Manifest, model_folder, read_manifest, serving_of
from pipeline.serving.sandbox import open_sandbox, prepare
from pipeline.serving.service import Service, supervise
from pipeline.serving.texts import present_model

Say = Callable[[str], None]

logger = logging.getLogger(__name__)


class Stop:
    """Remembers that the process was asked to end, by Ctrl-C or TERM; asking again changes nothing."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def configuration(run: RunDir | None, store: Path | None, engine: str | None, overrides: Sequence[str]) -> Config:
    """The run's configuration, or the defaults with the store's own limits, with overrides laid on it."""
    if run is not None:
        tree = read_config(run.root).plain()
    else:
        assert store is not None
        tree = {"serving": serving_of(read_manifest(store))}
    if engine is not None:
        tree = merge(tree, {"sandbox": {"engine": engine}})
    for text in overrides:
        tree = merge(tree, parse_override(text))
    if tree["serving"].get("bind", "auto") == "auto":
        tree = merge(tree, {"serving": {"bind": "unix"}})
    return check(tree, "--set" if overrides else "")


def serve(
    run: RunDir | None, store: Path | None, config: Config, devices: Sequence[str], say: Say, own_sandbox: bool = False
) -> None:
    """Serve a store, or the run's, until SIGINT or SIGTERM; then answer what was asked, and leave nothing behind.

    With a run the server is published there, for the run's trainings; its sandbox is the run's, where it has one and
    `own_sandbox` does not say otherwise.
    """
    if run is not None:
        _check_free(run, store)
    with tempfile.TemporaryDirectory(prefix="hh-serve-") as folder:
        home = run if run is not None else _stand_in(Path(folder), store, config)
        log = home.stage("serve") / "tritonserver.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        sandbox = {} if run is None or own_sandbox else run.values("sandbox")
        if not sandbox:
            sandbox = prepare(config, log.with_name("build.log"), logger.info)
        stop = Stop()  # only now: until here a Ctrl-C ends the process as usual
        with (
            _kept_log(log, temporary=run is None),
            open_sandbox(sandbox, log) as engine,
            supervise(home, config, engine, devices, log, str(os.getpid()), wait=False) as service,
        ):
            _until(stop, service, home, say)
            say("ending: what was asked is answered first")


@contextlib.contextmanager
def _kept_log(log: Path, temporary: bool) -> Iterator[None]:
    """Where the server's log would go with its temporary folder, keep it if the server fails: the error names it."""
    try:
        yield
    except UserError as error:
        if not temporary or not log.exists():
            raise
        kept = Path(tempfile.gettempdir()) / f"{log.stem}-{os.getpid()}.log"
        shutil.copyfile(log, kept)
        raise UserError(str(error).replace(str(log), str(kept))) from error


def announce(run: RunDir, config: Config, store: Path, alone: bool, say: Say) -> None:
    """Tell the run's servers and training of a store to change to; returns when it is served.

    UserError when the store does not fit the run, or cannot be served: the run then stays with its model.
    """
    manifest = read_manifest(store)
    _check_fits(run, config, store, manifest)
    published = Published(run, reward_models.expected(run))
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


def _stand_in(folder: Path, store: Path | None, config: Config) -> RunDir:
    """A run directory in which nothing was done but to convert the store."""
    assert store is not None
    run, manifest = RunDir(folder), read_manifest(store)
    atomic.write_text(run.config, dump(config))
    artifacts = {"model_store": Artifact(str(store.resolve()), "", 0)}
    run.write_outputs(Outputs("convert", "", 1, artifacts, {"identity": manifest.identity}))
    return run


def _check_free(run: RunDir, store: Path | None) -> None:
    """UserError when the run has a server, or is to use another model than the store's."""
    expected = reward_models.expected(run)
    if Published(run, None).alive():
        raise UserError(f"{run.root}: a server of this run is alive; stop it first, or announce a store with --swap")
    if store is not None and read_manifest(store).identity != expected:
        raise UserError(f"{store}: not the reward model of {run.root}; announce it with --swap, or leave out --run")


def _until(stop: Stop, service: Service, home: RunDir, say: Say) -> None:
    """Tick until asked to stop; say where the server is each time that this changes."""
    said = ""
    while not stop.asked:
        service.tick()
        if service.up and said != service.triton_host:
            said = service.triton_host
            for line in endpoint.env_file(home).read_text("utf-8").splitlines():
                say(line.removeprefix("export "))
        time.sleep(0.1)


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
    servers, deadline = Published(run, model.identity), time.monotonic() + limit_s + 30.0
    while not servers.alive():
        if (fault := reward_models.fault(run, model)) is not None:
            raise UserError(f"{model.store}: cannot be served: {fault}; the run stays with its model")
        if time.monotonic() > deadline:
            raise UserError(f"{model.store}: is not served within {limit_s:.0f} s; see the log of stage serve")
        time.sleep(0.2)
