"""The reward client: asks a Triton server for rewards, survives its restarts, and never makes a reward up."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from pipeline.config.schema import Config
from pipeline.config.serving import Serving
from pipeline.errors import UserError
from pipeline.run import endpoint, reward_models
from pipeline.run.directory import RunDir
from pipeline.run.sources import reward_model_path
from pipeline.serving import wire
from pipeline.serving.model_store import model_folder, read_manifest
from pipeline.serving.scorer import BatchScorer, LocalScorer, Scorer

_Answer = TypeVar("_Answer")

TRITON_HOST = "TRITON_HOST"
LIVE_S = 60.0
"""A published endpoint whose heartbeat is older than this belongs to a job that is gone."""

_CONNECT_S = 20.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_OUTAGE_LOG_S = 30.0

logger = logging.getLogger(__name__)

Locate = Callable[[], wire.Address | None]
"""Says where the server is now; None while nobody knows."""


def connect_scorer(
    run: RunDir,
    config: Config,
    environ: Mapping[str, str] = os.environ,
    device: str | None = None,
    identity: str | None = None,
) -> Scorer:
    """The run's source of rewards: $TRITON_HOST, else the published server, else the model itself in this process.

    `device` is where the in-process model goes; by default the current GPU, or the CPU where there is none.
    `identity` is the reward model's, by default that of the model which the run is to use.
    Raises UserError when the server cannot be reached or serves another reward model than the run is to use: the one
    that it converted, or that was announced since.
    """
    identity = identity or reward_models.expected(run)
    named = environ.get(TRITON_HOST)
    if named:
        address = wire.parse_address(named, tls=environ.get(wire.TLS_VARIABLE))
        logger.info("rewards come from %s=%s", TRITON_HOST, address)
        return TritonScorer(lambda: address, config.serving, identity, _CONNECT_S)
    servers = Published(run, identity, turn=int(environ.get("RANK", "0")))
    wait_s = float(environ.get(endpoint.WAIT_VARIABLE, "0"))
    published = _wait_for_endpoint(servers, wait_s)
    # A job that was given a server waits for it: what is published may be of before it moved, or by another clock.
    if published and (wait_s or servers.alive()):
        logger.info("rewards come from the run's server at %s", ", ".join(one.triton_host for one in published))
        return TritonScorer(servers, config.serving, identity, expected=lambda: endpoint.expected(run))
    if published:
        logger.warning("%s: ignored, its server has shown no life for %.0f s", run.endpoint, LIVE_S)
    if device is None:
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    if identity is not None or run.outputs("convert") is not None:
        store = reward_models.store_of(run, identity)
        folder = model_folder(store, read_manifest(store).model_name)
    else:
        folder = reward_model_path(run, config)
    logger.info("no reward server: rewards are computed in this process, on %s, from %s", device, folder)
    return LocalScorer(folder, config.serving, device, identity)


class TritonScorer(BatchScorer):
    """A `Scorer` over gRPC. Create it after forking; one a process."""

    def __init__(
        self,
        locate: Locate,
        serving: Serving,
        identity: str | None = None,
        connect_s: float | None = None,
        expected: Callable[[], bool] = lambda: False,
    ) -> None:
        """Connect, trying for `connect_s` seconds (default: `serving.retry_timeout_s`), and check what is served.

        While `expected` says that a server is on its way, patience has no end.
        Raises UserError when nothing answers, or when the served model's identity is not `identity` (if given).
        """
        self._locate = locate
        self._wanted = identity
        self._expected = expected
        self._where = "the run's reward server"
        self._link: _Link | None = None
        self._link_lock = threading.Lock()
        self._outage_logged = float("-inf")
        super().__init__(serving, identity, workers=serving.max_in_flight)
        try:
            link = self._patiently(lambda link: link, serving.retry_timeout_s if connect_s is None else connect_s)
        except BaseException:
            self.close()
            raise
        self._identity = link.identity

    def close(self) -> None:
        """See `Scorer`."""
        super().close()
        with self._link_lock:
            if self._link is not None:
                self._link.client.close()
                self._link = None

    def _score_batch(self, rows: list[list[int]]) -> list[float]:
        timeout_s = self._serving.request_timeout_s
        return self._patiently(
            lambda link: wire.infer(link.client, link.address.model, rows, timeout_s), self._serving.retry_timeout_s
        )

    def _patiently(self, ask: Callable[[_Link], _Answer], patience_s: float) -> _Answer:
        """Ask until there is an answer; errors that a server's restart explains are retried for `patience_s`.

        Each retry looks up where the server is and connects anew, since it may have moved.
        """
        first: float | None = None
        pause = _FIRST_PAUSE_S
        while True:
            link = None
            try:
                link = self._connected()
                answer = ask(link)
            except InferenceServerException as error:
                fault, now = wire.error_line(error), time.monotonic()
                where = str(link.address) if link is not None else self._where
                if not is_retriable(error):
                    raise UserError(f"{where}: the reward server refused: {fault}") from error
                first = now if first is None else first
                if now - first >= patience_s and not self._expected():
                    raise UserError(
                        f"{where}: no reward server answers there since {now - first:.0f} s ({fault}); "
                        f"check {TRITON_HOST} and the server's log"
                    ) from error
                self._report_outage(where, fault)
            else:
                self._outage_logged = float("-inf")
                return answer
            self._drop(link)
            if self._closed.wait(pause):
                raise RuntimeError("the scorer was closed")
            pause = min(_LONGEST_PAUSE_S, pause * 2)

    def _report_outage(self, where: str, fault: str) -> None:
        """Log the first failure of an outage and then one a while: every worker fails many times."""
        now = time.monotonic()
        if now - self._outage_logged >= _OUTAGE_LOG_S:
            self._outage_logged = now
            logger.warning("%s: no reward server answers (%s); trying again", where, fault)

    def _connected(self) -> _Link:
        """The connection that all workers share, made and checked on first use."""
        with self._link_lock:
            if self._closed.is_set():
                raise RuntimeError("the scorer was closed")
            if self._link is None:
                address = self._locate()
                if address is None:
                    raise InferenceServerException("no endpoint is published", status="StatusCode.UNAVAILABLE")
                self._where = str(address)
                self._link = self._open(address)
            return self._link

    def _open(self, address: wire.Address) -> _Link:
        client = wire.open_client(address)
        try:
            served = wire.served_identity(client, address.model, self._serving.request_timeout_s)
            if self._wanted is not None and served != self._wanted:
                raise UserError(
                    f"{TRITON_HOST}={address} serves another reward model ({_short(served)}) than this run is to use "
                    f"({_short(self._wanted)}); start that model's server, or unset {TRITON_HOST}"
                )
        except BaseException:
            client.close()
            raise
        return _Link(client, address, served)

    def _drop(self, link: _Link | None) -> None:
        """Forget a connection that failed. Not closed: other workers may still wait for replies on it."""
        with self._link_lock:
            if link is not None and self._link is link:
                self._link = None


@dataclass(frozen=True)
class _Link:
    client: triton.InferenceServerClient
    address: wire.Address
    identity: str | None


def is_retriable(error: InferenceServerException) -> bool:
    """Whether a server that is restarting, moving or overloaded explains the error. Scoring again changes nothing."""
    status, message = str(error.status() or ""), str(error.message() or "")
    if status == "StatusCode.UNAVAILABLE":
        return "restricted" not in message  # a missing access token: waiting does not help
    if status == "StatusCode.NOT_FOUND":
        return "no available versions" in message  # a server that ends has unloaded its model already
    if status == "StatusCode.INTERNAL":
        return "not healthy" in message  # the Python backend's process died; its supervisor restarts the server
    return status in ("StatusCode.CANCELLED", "StatusCode.DEADLINE_EXCEEDED")


class Published:
    """Where the run's servers are now. Each call names the next of them: ranks begin at different ones, and a server
    that does not answer is followed by another."""

    def __init__(self, run: RunDir, identity: str | None, turn: int = 0) -> None:
        """`identity`: which reward model they must serve, if it matters."""
        self.run = run
        self._identity = identity
        self._turn = turn

    def endpoints(self) -> list[endpoint.Endpoint]:
        """The endpoints that this node can reach; those that have shown life lately, where there are such."""
        here = os.uname().nodename
        found = [
            one
            for one in endpoint.read_all(self.run)
            if self._identity in (None, one.digest) and (not one.triton_host.startswith("unix:") or one.host == here)
        ]
        return [one for one in found if time.time() - one.heartbeat < LIVE_S] or found

    def alive(self) -> bool:
        """Whether one of them has shown life lately."""
        return any(time.time() - one.heartbeat < LIVE_S for one in self.endpoints())

    def __call__(self) -> wire.Address | None:
        found = self.endpoints()
        if not found:
            return None
        chosen = found[self._turn % len(found)]
        self._turn += 1
        return wire.parse_address(
            chosen.triton_host, str(endpoint.path(self.run, chosen.index, chosen.retiring)), chosen.tls
        )


def _wait_for_endpoint(servers: Published, wait_s: float) -> list[endpoint.Endpoint]:
    """The published endpoints. With `wait_s` there will be one: UserError when that time passes without it."""
    deadline = time.monotonic() + wait_s
    while not (published := servers.endpoints()) and wait_s:
        if time.monotonic() > deadline and not endpoint.expected(servers.run):
            raise UserError(
                f"{servers.run.endpoint}: the run's reward server was not ready within {wait_s:.0f} s "
                "(serving.start_timeout_s); see its log"
            )
        time.sleep(0.1)
    return published


def _short(identity: str | None) -> str:
    return identity[:12] if identity else "without an identity"
