"""The supervisor's decisions, with a server and a clock that the test moves."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers_serving import serving_config
from tritonclient.utils import InferenceServerException

from pipeline.config.serving import Serving
from pipeline.errors import UserError
from pipeline.run import endpoint
from pipeline.run.directory import RunDir
from pipeline.serving import supervisor, wire
from pipeline.serving.model_store import KnownAnswer, Manifest
from pipeline.serving.server import TritonServer
from pipeline.serving.supervisor import Supervisor
from pipeline.serving.usage import Usage

MANIFEST = Manifest(
    "id", "rm", "/rm", "w", "t", "float32", 64, 1024, 16, 1, {}, {"max_difference": 0.0},
    [KnownAnswer([1, 2][:length], 0.5) for length in (1, 2, 2, 1, 2, 1, 2)], 1e-3,
)  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeServer:
    """A server that loads in one tick and does what the test says."""

    triton_host = "127.0.0.1:1/rm"
    pid = 4242
    log_path = Path("/log")
    address = wire.Address("127.0.0.1:1", "rm")

    def __init__(self) -> None:
        self.log: list[str] = []
        self.fate: str | None = None
        self.loads = True
        self.canary: Callable[[Any, Any], None] | None = None
        self.usage = Usage()

    def start(self) -> None:
        self.log.append("start")
        self.fate, self.usage = None, Usage()

    def stop(self, grace_s: float | None = None) -> None:
        self.log.append("stop")

    def remove_socket_folder(self) -> None:
        self.log.append("gone")

    def ended(self) -> str | None:
        return self.fate

    def ready(self) -> bool:
        if self.fate is not None:
            raise UserError(f"tritonserver {self.fate}")
        return self.loads

    def check(self, manifest: Manifest, serving: Serving) -> float:
        self.log.append("check")
        return TritonServer.check(self, manifest, serving)  # type: ignore[arg-type]

    def infer(self, _model: str, inputs: list[Any], client_timeout: float) -> Any:
        (rows, _) = inputs[0].shape()
        self.was_asked(requests=1, sequences=rows, executions=1)
        rewards = np.full((rows, 1), 0.5, np.float32)
        return SimpleNamespace(as_numpy=lambda name: rewards if name == "rewards" else None)

    def was_asked(self, **more: float) -> None:
        """Count more of what it did."""
        self.usage = replace(self.usage, **{name: getattr(self.usage, name) + count for name, count in more.items()})

    def last_error(self) -> str:
        return "out of memory"

    def client(self) -> Any:
        return self

    def get_inference_statistics(self, _model: str, client_timeout: float) -> Any:
        """As Triton tells it."""
        told, name = self.usage, SimpleNamespace
        none = name(count=0, ns=0)
        inference = name(
            success=name(count=told.requests, ns=0),
            fail=name(count=told.failed, ns=0),
            queue=name(count=0, ns=int(told.queue_s * 1e9)),
            compute_input=none,
            compute_infer=name(count=0, ns=int(told.compute_s * 1e9)),
            compute_output=none,
        )
        counts = {"inference_count": told.sequences, "execution_count": told.executions}
        return name(model_stats=[name(inference_stats=inference, **counts)])

    def async_infer(
        self, _model: str, _inputs: Any, callback: Callable[[Any, Any], None], client_timeout: float
    ) -> None:
        self.canary = callback
        self.was_asked(requests=1, sequences=1, executions=1)


class Story:
    """A supervisor with its fake server, clock and run directory."""

    def __init__(self, root: Path, max_batch_size: int = 16) -> None:
        self.run, self.server, self.clock = RunDir(root), FakeServer(), Clock()
        self.places_taken = 0
        self.supervisor = Supervisor(
            self.run,
            self.server,  # type: ignore[arg-type]
            MANIFEST,
            serving_config(max_batch_size=max_batch_size).serving,
            "job7",
            self.clock,
            before_publishing=self._take_place,
        )

    def _take_place(self) -> None:
        self.places_taken += 1

    def tick(self, after_s: float = 1.0) -> None:
        self.clock.now += after_s
        self.supervisor.tick()

    @property
    def published(self) -> endpoint.Endpoint | None:
        return endpoint.read(self.run)


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path)


def test_a_server_is_published_after_it_answered_and_withdrawn_at_the_end(story: Story) -> None:
    story.supervisor.start()
    assert story.server.log == ["start", "check"]
    published = story.published
    assert published is not None
    assert (published.triton_host, published.digest, published.job_id) == ("127.0.0.1:1/rm", "id", "job7")
    assert (published.pid, published.restarts, published.host) == (4242, 0, os.uname().nodename)
    assert endpoint.env_file(story.run).read_text() == "export TRITON_HOST=127.0.0.1:1/rm\n"
    story.supervisor.stop()
    assert story.published is None
    assert story.server.log == ["start", "check", "stop", "gone"]


def test_a_start_may_be_left_to_the_ticks(story: Story) -> None:
    story.supervisor.start(wait=False)
    assert story.server.log == ["start"]
    assert story.published is None
    story.tick()
    assert story.supervisor.up
    assert story.published is not None


def test_a_first_start_that_fails_is_not_repeated(story: Story) -> None:
    story.supervisor.start(wait=False)
    story.server.fate = "ended with status 1: failed to load"
    with pytest.raises(UserError, match="failed to load"):
        story.tick()
    assert story.server.log == ["start"]


def test_a_start_that_takes_too_long_names_the_setting(story: Story) -> None:
    story.server.loads = False
    story.supervisor.start(wait=False)
    story.tick(119.0)
    with pytest.raises(UserError, match=r"serving\.start_timeout_s = 120 s: out of memory"):
        story.tick(2.0)


def test_a_dead_server_is_started_again_after_a_pause(story: Story) -> None:
    story.supervisor.start()
    story.server.fate = "was killed by signal 9"
    story.tick()
    assert story.server.log[2:] == ["stop"]
    story.tick(0.4)
    assert story.server.log[2:] == ["stop"]
    story.tick(0.2)
    story.tick()
    assert story.server.log[2:] == ["stop", "start", "check"]
    published = story.published
    assert published is not None
    assert published.restarts == 1


def test_restarts_in_a_row_have_an_end(story: Story) -> None:
    story.supervisor.start()
    with pytest.raises(UserError, match=r"failed 6 times in a row, the last time: tritonserver was killed"):
        for _ in range(100):
            story.server.fate = "was killed by signal 9"
            story.tick(30.0)
    assert story.server.log.count("start") == 1 + supervisor.MAX_RESTARTS


def test_a_server_that_only_looks_alive_is_restarted(story: Story) -> None:
    story.supervisor.start()
    story.tick(supervisor.CANARY_S)
    assert story.server.canary is not None
    error = InferenceServerException("Stub process 'rm_0_0' is not healthy.", status="StatusCode.INTERNAL")
    story.server.canary(None, error)
    story.tick()
    assert story.server.log[2:] == ["stop"]


@pytest.mark.parametrize(("reward", "healthy"), [(0.5004, True), (0.6, False)])
def test_a_wrong_answer_is_a_fault(reward: float, healthy: bool, story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    story.supervisor.start()
    monkeypatch.setattr(wire, "read_rewards", lambda result, count: [result])
    story.tick(supervisor.CANARY_S)
    assert story.server.canary is not None
    story.server.canary(reward, None)
    story.tick()
    assert (story.server.log[2:] == []) is healthy


def test_a_reply_that_is_no_reward_is_a_fault(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    story.supervisor.start()
    story.tick(supervisor.CANARY_S)
    assert story.server.canary is not None
    story.server.canary(SimpleNamespace(as_numpy=lambda name: np.array([[math.nan]], np.float32)), None)
    story.tick()
    assert story.server.log[2:] == ["stop"]


def test_the_heartbeat_goes_on_while_the_server_is_down(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    story.supervisor.start()
    story.server.fate = "was killed by signal 9"
    monkeypatch.setattr(time, "time", lambda: 5e9)
    story.tick(supervisor.BEAT_S)
    story.tick(supervisor.BEAT_S)
    assert story.published is not None
    assert story.published.heartbeat == 5e9


def test_a_server_that_makes_room_is_published_apart_and_alive_and_may_take_its_place_back(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    story.supervisor.start()
    mine = story.published
    assert mine is not None
    monkeypatch.setattr(time, "time", lambda: 5e9)
    story.supervisor.retire()
    assert endpoint.read(story.run, retiring=True) == replace(mine, retiring=True, heartbeat=5e9)
    other = replace(mine, digest="other", pid=7, triton_host="unix:/other")
    endpoint.publish(story.run, other)
    monkeypatch.setattr(time, "time", lambda: 6e9)
    story.supervisor.reinstate()
    assert endpoint.read_all(story.run) == [replace(mine, heartbeat=6e9)]
    assert endpoint.env_file(story.run).read_text() == "export TRITON_HOST=127.0.0.1:1/rm\n"
    assert endpoint.replaced(story.run, other)  # whose end leaves this one's endpoint alone
    story.supervisor.stop()
    assert endpoint.read_all(story.run) == []


def test_a_restarted_server_takes_nobodys_place_a_second_time(story: Story) -> None:
    story.supervisor.start()
    assert story.places_taken == 1
    story.server.fate = "was killed by signal 9"
    story.tick()
    story.tick(0.6)
    story.tick()
    assert story.supervisor.up and story.supervisor.restarts == 1 and story.places_taken == 1


def test_a_server_whose_place_was_taken_leaves_the_other_ones_endpoint_alone(story: Story) -> None:
    story.supervisor.start()
    mine = story.published
    assert mine is not None
    other = replace(mine, host="another-node", pid=7)
    endpoint.publish(story.run, other)
    story.tick(after_s=supervisor.BEAT_S + 1)
    assert story.published == other
    story.supervisor.stop()
    assert story.published == other
