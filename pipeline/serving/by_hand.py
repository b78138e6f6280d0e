"""What `python -m pipeline.serve` does: a server until one is told to stop."""

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

from pipeline import procs
from pipeline.config.load import check, dump, merge, parse_override, read_config
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run import atomic, endpoint, owner, reward_models
from pipeline.run.directory import Artifact, Outputs, RunDir
from pipeline.serving import access
from pipeline.serving.client import Published
from pipeline.serving.model_store import MANIFEST, read_manifest, serving_of
from pipeline.serving.sandbox import open_sandbox, prepare
from pipeline.serving.service import Service, supervise

Say = Callable[[str], None]

_FOLDER = "hh-serve-"

logger = logging.getLogger(__name__)


class Stop:
    """Remembers that the process was asked to end, by Ctrl-C or TERM; asking again changes nothing."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def check_store(store: Path) -> None:
    """UserError when what somebody names is no model store, or one that every user may change."""
    if not (store / MANIFEST).is_file():
        raise UserError(f"{store}: not a model store, it has no {MANIFEST}; give the folder that convert wrote")
    access.check(store)


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
    owner.sweep_folders(Path(tempfile.gettempdir()), _FOLDER)  # of those that were killed
    with tempfile.TemporaryDirectory(prefix=f"{_FOLDER}{owner.mark(procs.this_process())}") as folder:
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
        handle, kept = tempfile.mkstemp(prefix=f"{log.stem}-", suffix=".log")
        with os.fdopen(handle, "wb") as copy, log.open("rb") as written:
            shutil.copyfileobj(written, copy)
        raise UserError(str(error).replace(str(log), kept)) from error


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
