"""Keeps a reward server running and published for as long as a job needs it. No threads: the job's loop ticks."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from tritonclient.utils import InferenceServerException

from pipeline.config.serving import Serving
from pipeline.errors import UserError
from pipeline.run import endpoint, service_metrics
from pipeline.run.directory import RunDir
from pipeline.serving import known, wire
from pipeline.serving.model_store import VERSION, Manifest
from pipeline.serving.server import TritonServer
from pipeline.serving.usage import Usage, read_usage

MAX_RESTARTS = 5
"""Restarts in a row; a server that stays healthy for HEALTHY_S starts a new row."""
HEALTHY_S = 600.0
BEAT_S = 5.0
CANARY_S = 15.0
"""Seconds between known-answer inferences: a server whose model process died still calls itself ready."""
_COUNT_S = 1.0
"""Seconds that a server, which has just given an answer, may take to tell its counts."""

logger = logging.getLogger(__name__)


class Supervisor:
    """Starts, publishes, watches and restarts one server."""

    def __init__(
        self,
        run: RunDir,
        server: TritonServer,
        manifest: Manifest,
        serving: Serving,
        job_id: str,
        clock: Callable[[], float] = time.monotonic,
        index: int = 0,
        before_publishing: Callable[[], None] = lambda: None,
    ) -> None:
        """`index` tells the servers of one run apart; `before_publishing` is called when another's place is taken."""
        self._index = index
        self._before_publishing = before_publishing
        self._retiring = False
        self._run = run
        self._server = server
        self._manifest = manifest
        self._serving = known.within_store(serving, manifest)
        self._job_id = job_id
        self._clock = clock
        self._phase: Literal["up", "waiting", "starting", "stopped"] = "stopped"
        self._started = 0.0
        self._until = 0.0
        """When waiting ends, or when starting has taken too long."""
        self._since = 0.0
        self._in_a_row = 0
        self._restarts = 0
        self._endpoint: endpoint.Endpoint | None = None
        self._beaten = 0.0
        self._canary_at = 0.0
        self._canary: list[str | None] | None = None
        """None: none under way; []: under way; [None]: healthy; [text]: what is wrong."""
        self._asked_by_us = 0
        """Requests of this supervisor's own since the counts were last read."""
        self._usage = Usage()
        self._counted = 0.0
        self._last_used = 0.0

    @property
    def triton_host(self) -> str:
        """What clients' TRITON_HOST must be; the same after a restart, unless the port was taken meanwhile."""
        return self._server.triton_host

    @property
    def identity(self) -> str:
        """Which reward model it serves."""
        return self._manifest.identity

    @property
    def idle_s(self) -> float:
        """For how long nobody is known to have asked for a reward."""
        return self._clock() - self._last_used

    @property
    def restarts(self) -> int:
        """How often the server was started again."""
        return self._restarts

    @property
    def up(self) -> bool:
        """Whether the server is ready and published."""
        return self._phase == "up"

    def start(self, wait: bool = True) -> None:
        """Start the server and, unless told not to, wait until it is ready, right and published."""
        self._start()
        while wait and not self.up:
            self.tick()
            time.sleep(0.05)

    def tick(self) -> None:
        """Renew the heartbeat, look after the server, and move a restart one step on. Never waits for a load.

        Raises UserError when the server died MAX_RESTARTS times in a row.
        """
        now = self._clock()
        if self._endpoint is not None and now - self._beaten >= BEAT_S:
            self._beaten = now
            endpoint.beat(self._run, self._endpoint)
        if self._phase == "up":
            self._watch(now)
        elif self._phase == "waiting" and now >= self._until:
            self._restarts += 1
            self._attempt(self._start)
        elif self._phase == "starting":
            self._attempt(self._finish_start)

    def retire(self) -> None:
        """Make room for a server of another model: go on serving those who use this one, published apart."""
        self._retiring = True
        if self._endpoint is not None:
            self._endpoint = replace(self._endpoint, retiring=True, heartbeat=time.time())
            endpoint.publish(self._run, self._endpoint)

    def reinstate(self) -> None:
        """Take back the place that `retire` gave away, from a server that goes; never unpublished meanwhile."""
        self._retiring = False
        if self._endpoint is not None:
            self._endpoint = replace(self._endpoint, retiring=False, heartbeat=time.time())
            endpoint.publish(self._run, self._endpoint)
            endpoint.withdraw(self._run, self._index, retiring=True)

    def stop(self) -> None:
        """Withdraw the endpoint and drain the server: what it was asked is answered."""
        if self.up and self._server.ended() is None:
            self._count()
        self._phase = "stopped"
        if self._endpoint is not None:
            if not endpoint.replaced(self._run, self._endpoint):
                endpoint.withdraw(self._run, self._index, self._retiring)
            self._endpoint = None
        self._server.stop()
        self._server.remove_socket_folder()

    def _start(self) -> None:
        self._server.start()
        self._started = self._clock()
        self._phase, self._until = "starting", self._started + self._serving.start_timeout_s

    def _publish(self) -> None:
        self._server.check(self._manifest, self._serving)
        now = time.time()
        self._endpoint = endpoint.Endpoint(
            triton_host=self.triton_host,
            model=self._manifest.model_name,
            version=VERSION,
            digest=self._manifest.identity,
            job_id=self._job_id,
            host=os.uname().nodename,
            pid=self._server.pid,
            restarts=self._restarts,
            started=now,
            heartbeat=now,
            index=self._index,
            tls=self._server.address.tls or "",
            retiring=self._retiring,
        )
        self._before_publishing()
        self._before_publishing = lambda: None  # a restart takes nobody's place
        endpoint.publish(self._run, self._endpoint)
        self._phase, self._since = "up", self._clock()
        self._canary, self._canary_at = None, self._since + CANARY_S
        self._usage, self._counted, self._last_used = Usage(), self._since, self._since
        self._asked_by_us = known.requests_for(
            [answer.tokens for answer in self._manifest.known_answers], self._serving
        )

    def _watch(self, now: float) -> None:
        ended = self._server.ended()
        if ended is not None:
            self._down(f"tritonserver {ended}")
            return
        if now - self._since >= HEALTHY_S:
            self._in_a_row = 0
        if self._canary is None and now >= self._canary_at:
            self._send_canary()
        elif self._canary:
            fault, self._canary, self._canary_at = self._canary[0], None, now + CANARY_S
            if fault is not None:
                self._down(f"tritonserver {fault}")
            else:
                self._count()

    def _count(self) -> None:
        """Record what the server did since the last time, if others than this supervisor asked it for anything."""
        try:
            usage = read_usage(self._server.client(), self._manifest.model_name, _COUNT_S)
        except InferenceServerException as error:
            logger.warning("%s does not tell its counts: %s", self.triton_host, wire.error_line(error))
            return
        now = self._clock()
        since, seconds, own = usage.since(self._usage), now - self._counted, self._asked_by_us
        self._usage, self._counted = usage, now
        self._asked_by_us = max(0, own - since.requests - since.failed)  # a count may come after its answer
        if since.requests + since.failed > own:
            self._last_used = now
            row = {"time": round(time.time(), 3), "server": self._index, "reward_model": self.identity}
            service_metrics.append(self._run, row | since.row(max(seconds, 1e-3)))

    def _send_canary(self) -> None:
        """Ask for one known answer without waiting; gRPC's thread leaves the verdict in `_canary`."""
        answer = self._manifest.known_answers[-1]
        verdict: list[str | None] = []
        tolerance = self._manifest.answer_tolerance

        def judge(result: object, error: InferenceServerException | None) -> None:
            try:
                if error is not None:
                    raise ValueError(wire.error_line(error))
                (reward,) = wire.read_rewards(result, 1)
                if abs(reward - answer.reward) > tolerance:
                    raise ValueError(f"the reward is {reward:.6g}, not {answer.reward:.6g}")
            except (UserError, ValueError) as fault:
                verdict.append(f"answered wrongly to a known question: {fault}")
            else:
                verdict.append(None)

        self._canary = verdict
        self._asked_by_us += 1
        self._server.client().async_infer(
            self._manifest.model_name,
            wire.request_inputs([answer.tokens]),
            judge,
            client_timeout=self._serving.request_timeout_s,
        )

    def _attempt(self, step: Callable[[], None]) -> None:
        """Run a step of a start. A server that never was up is the user's to mend; one that was is tried again."""
        try:
            step()
        except UserError as error:
            if self._endpoint is None:
                raise
            self._down(str(error))

    def _finish_start(self) -> None:
        if self._server.ready():
            self._publish()
            seconds = self._clock() - self._started
            logger.info("%s is ready after %.1f s (restart %d)", self.triton_host, seconds, self._restarts)
        elif self._clock() > self._until:
            raise UserError(
                f"tritonserver is not ready within serving.start_timeout_s = {self._serving.start_timeout_s:.0f} s: "
                f"{self._server.last_error()} (log: {self._server.log_path})"
            )

    def _down(self, reason: str) -> None:
        """End what is left of the server and plan its restart, or give up."""
        self._server.stop(grace_s=1.0)  # nothing of a failed server is worth waiting for
        self._in_a_row += 1
        if self._in_a_row > MAX_RESTARTS:
            raise UserError(
                f"tritonserver failed {self._in_a_row} times in a row, the last time: {reason} "
                f"(log: {self._server.log_path})"
            )
        pause = min(60.0, 0.5 * 2 ** (self._in_a_row - 1))
        logger.warning("%s; starting it again in %.1f s", reason, pause)
        self._phase, self._until = "waiting", self._clock() + pause
