"""A run's reward server for as long as a job needs it: one supervised server, and two while the model changes."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run import reward_models
from pipeline.run.directory import RunDir
from pipeline.run.reward_models import RewardModel
from pipeline.serving import tls
from pipeline.serving.engines import Engine
from pipeline.serving.model_store import read_manifest
from pipeline.serving.server import TritonServer, make_spec
from pipeline.serving.supervisor import Supervisor

LINGER_S = 60.0
"""A server whose model no training uses any more ends when nobody has asked it for so long."""
SETTLE_S = 5.0
"""Nobody begins to use an announced model so long after another one was announced."""
_LOOK_S = 1.0

logger = logging.getLogger(__name__)

Make = Callable[[Path, Callable[[], None]], Supervisor]
"""Makes the supervisor of a model store, given what it is to call before it publishes."""


@contextlib.contextmanager
def supervise(
    run: RunDir,
    config: Config,
    engine: Engine,
    devices: Sequence[str],
    log_path: Path,
    job_id: str,
    *,
    wait: bool = True,
    index: int = 0,
) -> Iterator[Service]:
    """Serve the run's reward model while the block runs; the block calls `tick` about once a second.

    On entry the server is ready, has answered the known questions and is published; with `wait=False` it is only
    started, `triton_host` is known, and the ticks see to the rest, so that clients can start meanwhile. On exit it is
    drained and withdrawn. `index` tells the servers of one run apart.
    Raises UserError, here or in a tick, when it does not start.
    """
    certificates = tls.ensure(run.endpoint.parent / "tls") if config.serving.bind in ("loopback", "network") else None
    env = {**os.environ, "OMP_NUM_THREADS": str(config.serving.num_threads)}
    serving = config.serving
    first = [log_path]

    def make(store: Path, before_publishing: Callable[[], None]) -> Supervisor:
        manifest = read_manifest(store)
        log = first.pop() if first else log_path.with_name(f"{log_path.stem}-{manifest.identity[:8]}.log")
        spec = make_spec(serving, store, devices, certificates, config.cluster.interface)
        server = TritonServer(engine, spec, manifest.model_name, log, env)
        return Supervisor(run, server, manifest, serving, job_id, index=index, before_publishing=before_publishing)

    service = Service(run, make)
    try:
        service.start(wait)
        yield service
    finally:
        service.stop()


class Service:
    """One supervised server, followed by another when another reward model is announced.

    The new one starts beside the old one and takes its place once it has answered. The old one goes on, published
    apart, until no training is scored by its model and nobody asks it any more. A third one waits for that, or takes
    the place of the second where the training has not come to that. A model that was announced to be served alone
    starts when the training has left the old one.
    """

    def __init__(self, run: RunDir, make: Make, clock: Callable[[], float] = time.monotonic) -> None:
        self._run = run
        self._make = make
        self._clock = clock
        self._current = make(reward_models.store_of(run), lambda: None)
        self._next: tuple[RewardModel, Supervisor] | None = None
        self._retired: list[Supervisor] = []
        self._looked = float("-inf")
        self._wanted: str | None = None
        self._wanted_since = 0.0

    @property
    def triton_host(self) -> str:
        """What clients' TRITON_HOST must be; the same after a restart, another after a change of model."""
        return self._current.triton_host

    @property
    def identity(self) -> str:
        """Which reward model is served."""
        return self._current.identity

    @property
    def restarts(self) -> int:
        """How often the server was started again."""
        return self._current.restarts

    @property
    def up(self) -> bool:
        """Whether the server is ready and published."""
        return self._current.up

    def start(self, wait: bool = True) -> None:
        """See `Supervisor.start`."""
        self._current.start(wait)

    def tick(self) -> None:
        """See `Supervisor.tick`; of all servers. Also looks for an announced model."""
        self._current.tick()
        if self._next is not None:
            self._tick_next(*self._next)
        for server in list(self._retired):
            self._tick_retired(server)
        if self._clock() - self._looked >= _LOOK_S:
            self._looked = self._clock()
            self._look()

    def stop(self) -> None:
        """Withdraw and drain all servers."""
        with contextlib.ExitStack() as stack:  # each is stopped, whatever becomes of the others
            stack.callback(self._current.stop)
            for server in self._retired:
                stack.callback(server.stop)
            if self._next is not None:
                stack.callback(self._next[1].stop)

    def _look(self) -> None:
        """Take up a model that was announced."""
        model = reward_models.announced(self._run)
        wanted = reward_models.expected(self._run)
        if wanted != self._wanted:
            self._wanted, self._wanted_since = wanted, self._clock()
        if self._next is not None and self._next[0].identity != wanted:
            logger.info("reward model %s is not wanted any more", self._next[0].identity[:12])
            self._next[1].stop()
            self._next = None
        if self._next is not None or not self.up or wanted in (None, self.identity):
            return
        if self._retired:  # there is room for one beside the current one, published and in memory
            self._make_room()
            return
        alone = model is not None and model.alone
        if alone and self._in_use(self._current):
            return
        logger.info("reward model %s was announced: its server starts", str(wanted)[:12])
        try:
            store = reward_models.store_of(self._run)
            server = None if alone else self._make(store, self._current.retire)
        except UserError as error:
            self._refuse(model, error)
            return
        if server is None:
            self._current.stop()  # before the other is made, which may be to have its port
            self._current = self._make(store, lambda: None)
            self._current.start(wait=False)
            return
        if model is None:  # an announcement was found faulty: back to what was converted
            model = RewardModel(server.identity, "", "")
        self._next = (model, server)
        server.start(wait=False)

    def _make_room(self) -> None:
        """Give the place of a server that nobody has come to use back to the one before it, which is still used.

        A retired server that is not used ends by itself.
        """
        if self._clock() - self._wanted_since < SETTLE_S or not self._left(self._current):
            return
        logger.info("reward model %s makes room: it is not used", self.identity[:12])
        earlier = self._retired.pop()
        earlier.reinstate()
        self._current.stop()
        self._current = earlier

    def _tick_next(self, model: RewardModel, server: Supervisor) -> None:
        try:
            server.tick()
        except UserError as error:
            server.stop()
            self._next = None
            self._refuse(model, error)
            return
        if server.up:
            logger.info("%s serves reward model %s now", server.triton_host, server.identity[:12])
            self._retired.append(self._current)
            self._current, self._next = server, None

    def _tick_retired(self, server: Supervisor) -> None:
        try:
            server.tick()
        except UserError as error:
            logger.warning("%s", error)  # its clients are told by its absence
        else:
            if not self._left(server):
                return
        server.stop()
        self._retired.remove(server)

    def _left(self, server: Supervisor) -> bool:
        """Whether no training is scored by this server's model, and nobody else has asked it lately."""
        return not self._in_use(server) and server.idle_s >= LINGER_S

    def _in_use(self, server: Supervisor) -> bool:
        """Whether a training is scored by this server's model; where there is none, whether anyone is."""
        used = reward_models.in_use(self._run)
        return used == server.identity if used is not None else server.idle_s < LINGER_S

    def _refuse(self, model: RewardModel | None, error: UserError) -> None:
        """Stay with the present model."""
        logger.warning("the announced reward model cannot be served: %s", error)
        if model is None or model.number == 0:
            raise error
        reward_models.fail(self._run, model, str(error))
