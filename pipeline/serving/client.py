"""The reward client: asks Triton servers for rewards, survives their restarts, and never makes a reward up."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping

from tritonclient.utils import InferenceServerException

from pipeline.config.schema import Config
from pipeline.config.serving import Serving
from pipeline.errors import UserError
from pipeline.run import endpoint
from pipeline.run.directory import RunDir
from pipeline.serving import wire
from pipeline.serving.known import PROBE_S, Reference, examine, run_reference
from pipeline.serving.model_store import reward_folder
from pipeline.serving.pool import Link, Locate, Place, ServerPool
from pipeline.serving.scorer import BatchScorer, LocalScorer, Scorer, refit

TRITON_HOST = "TRITON_HOST"
LIVE_S = 60.0
"""A published endpoint whose heartbeat is older than this belongs to a job that is gone."""

_CONNECT_S = 20.0
_MOST_FAILURES = 10
"""Times that one request may fail on servers which had just given the known answers: it may be what ends them."""

logger = logging.getLogger(__name__)


def connect_scorer(
    run: RunDir,
    config: Config,
    environ: Mapping[str, str] = os.environ,
    device: str | None = None,
    identity: str | None = None,
) -> Scorer:
    """The run's source of rewards: $TRITON_HOST, else the published servers, else the model itself in this process.

    `device` is where the in-process model goes; by default the current GPU, or the CPU where there is none.
    `identity` is the reward model's, by default that of the model which the run is to use.
    Raises UserError when no server can be reached or they serve another reward model than the run is to use: the one
    that it converted, or that was announced since.
    """
    reference = run_reference(run, identity)
    named = environ.get(TRITON_HOST)
    if named:
        place = Place(wire.parse_address(named, tls=environ.get(wire.TLS_VARIABLE)))
        logger.info("rewards come from %s=%s", TRITON_HOST, place.address)
        return TritonScorer(lambda: [place], config.serving, reference, _CONNECT_S)
    servers = Published(run, reference.identity, turn=int(environ.get("RANK", "0")))
    wait_s = float(environ.get(endpoint.WAIT_VARIABLE, "0"))
    published = _wait_for_endpoint(servers, wait_s)
    # A job that was given a server waits for it: what is published may be of before it moved, or by another clock.
    if published and (wait_s or servers.alive()):
        logger.info("rewards come from the run's server at %s", ", ".join(one.triton_host for one in published))
        return TritonScorer(servers, config.serving, reference, expected=lambda: endpoint.expected(run))
    if published:
        logger.warning("%s: ignored, its server has shown no life for %.0f s", run.endpoint, LIVE_S)
    if device is None:
        import torch

        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    folder = reward_folder(run, config, reference.identity)
    logger.info("no reward server: rewards are computed in this process, on %s, from %s", device, folder)
    return LocalScorer(folder, config.serving, device, reference.identity)


class TritonScorer(BatchScorer):
    """A `Scorer` over gRPC, from one server or several. Create it after forking; one a process."""

    def __init__(
        self,
        locate: Locate,
        serving: Serving,
        reference: Reference | None = None,
        connect_s: float | None = None,
        expected: Callable[[], bool] = lambda: False,
    ) -> None:
        """Connect, trying for `connect_s` seconds (default: `serving.retry_timeout_s`), and check what is served.

        While `expected` says that a server is on its way, patience has no end.
        Raises UserError when nothing answers, or when what answers is not the `reference`.
        """
        self._reference = reference or Reference()
        self._deciding = threading.Lock()
        self._expected = expected
        self._wanted = serving
        super().__init__(serving, self._reference.identity, workers=serving.max_in_flight)
        self._pool = ServerPool(locate, self._open, expected)
        patience_s = serving.retry_timeout_s if connect_s is None else connect_s
        try:
            link = self._pool.borrow(0, time.monotonic(), patience_s)
        except BaseException:
            self.close()
            raise
        self._pool.give_back(link, 0, answered=True)
        self._identity, self._serving = link.identity, link.serving  # within its limits from the first request on

    def close(self) -> None:
        """See `Scorer`. Requests that are under way are cancelled."""
        super().close()
        self._pool.close()

    def _score_batch(self, rows: list[list[int]]) -> list[float]:
        try:
            return self._patiently(rows)
        except _OutOfMemoryError as error:
            if len(rows) == 1:
                raise UserError(f"{error}; even alone, a sequence of {len(rows[0])} tokens does not fit") from error
            logger.warning("%s; asked for in halves: lower serving.max_batch_tokens", error)
        half = (len(rows) + 1) // 2
        return self._score_batch(rows[:half]) + self._score_batch(rows[half:])

    def _patiently(self, rows: list[list[int]]) -> list[float]:
        """Ask until there is an answer, of whichever server will do. Errors that a server's end, move or overload
        explains are retried: for `serving.retry_timeout_s`, and not for ever where the request itself may be why."""
        tokens, patience_s = len(rows) * max(map(len, rows)), self._serving.retry_timeout_s
        since, failures = time.monotonic(), 0
        while True:
            link = self._pool.borrow(tokens, since, patience_s)
            since = since if failures else time.monotonic()
            answered = False
            try:
                rewards = self._ask(link, rows)
                answered = True
                return rewards
            except InferenceServerException as error:
                fault, waited_s, failures = wire.error_line(error), time.monotonic() - since, failures + 1
                if is_out_of_memory(error):
                    raise _OutOfMemoryError(f"{link.address}: the reward server refused: {fault}") from error
                if not is_retriable(error):
                    raise UserError(f"{link.address}: the reward server refused: {fault}") from error
                if failures >= _MOST_FAILURES or (waited_s >= patience_s and not self._expected()):
                    raise UserError(
                        f"{link.address}: {len(rows)} sequences got no reward in {failures} tries and {waited_s:.0f} s "
                        f"({fault}); see the server's log, serving.request_timeout_s and serving.max_batch_tokens"
                    ) from error
                self._pool.drop(link, fault)
            finally:
                self._pool.give_back(link, tokens, answered=answered)

    def _ask(self, link: Link, rows: list[list[int]]) -> list[float]:
        """The rewards, in several replies where the request was cut for a server that takes more than this one."""
        rewards = [0.0] * len(rows)
        for part in refit(rows, link.serving):
            for index, reward in zip(part, self._ask_once(link, [rows[index] for index in part]), strict=True):
                rewards[index] = reward
        return rewards

    def _ask_once(self, link: Link, rows: list[list[int]]) -> list[float]:
        """The rewards, once it is known which model gave them.

        gRPC connects anew by itself, so another server may have answered than the one that was examined.
        """
        model, timeout_s = link.address.model, self._serving.request_timeout_s
        try:
            reply = wire.ask(link.client, model, rows, timeout_s)
            same = reply.mark == wire.mark_of(link.identity)
            if reply.mark is None:
                served = wire.served_parameters(link.client, model, min(PROBE_S, timeout_s))
                same = served.get("identity") == link.identity
        except UserError as error:
            raise UserError(f"{link.address}: {error}") from error
        except ValueError as error:
            if self._closed.is_set():  # gRPC's word for a closed connection
                raise RuntimeError("the scorer was closed") from error
            raise
        if not same:
            raise InferenceServerException("another model has taken its place", status="StatusCode.UNAVAILABLE")
        return reply.rewards

    def _open(self, address: wire.Address) -> Link:
        """Connect to a server and examine it."""
        client = wire.open_client(address)
        try:
            while True:
                reference = self._reference
                found, limited = examine(client, address, reference, self._wanted)
                with self._deciding:
                    if self._reference is reference:  # else another server has decided meanwhile: ask again
                        self._reference = found
                        return Link(client, address, found.identity, limited)
        except BaseException as error:
            client.close()
            if isinstance(error, InferenceServerException) and not is_retriable(error):
                raise UserError(f"{address}: the reward server refused: {wire.error_line(error)}") from error
            raise


class _OutOfMemoryError(Exception):
    """A request was too large for the server's memory."""


def is_out_of_memory(error: InferenceServerException) -> bool:
    """Whether a smaller request may succeed."""
    message = str(error.message() or "").lower()
    return "out of memory" in message or "outofmemory" in message


def is_retriable(error: InferenceServerException) -> bool:
    """Whether a server that is restarting, moving or overloaded explains the error. Scoring again changes nothing."""
    status, message = str(error.status() or ""), str(error.message() or "")
    if status == "StatusCode.UNAVAILABLE":
        return "restricted" not in message  # a missing access token: waiting does not help
    if status == "StatusCode.NOT_FOUND":
        return "no available versions" in message  # a server that ends has unloaded its model already
    if status == "StatusCode.INTERNAL":
        # The Python backend's process died, and its supervisor restarts the server; or the connection broke.
        return "not healthy" in message or "RST_STREAM" in message
    if status == "StatusCode.INVALID_ARGUMENT":
        return "batch-size must be <=" in message  # a server with smaller limits has taken its place: see them first
    if status == "StatusCode.UNKNOWN":
        return "Stream removed" in message  # gRPC's word for a server that was killed
    return status in ("StatusCode.CANCELLED", "StatusCode.DEADLINE_EXCEEDED")


class Published:
    """Where the run's servers are now, in an order that is another on each rank: they begin at different ones."""

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

    def __call__(self) -> list[Place]:
        found = self.endpoints()
        first = self._turn % len(found) if found else 0
        places = (self._place(one) for one in found[first:] + found[:first])
        return list(dict.fromkeys(places))  # one that is about to retire is published twice for a moment

    def _place(self, one: endpoint.Endpoint) -> Place:
        address = wire.parse_address(one.triton_host, str(endpoint.path(self.run, one.index, one.retiring)), one.tls)
        return Place(address, f"{one.host} {one.pid} {one.started}")


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
