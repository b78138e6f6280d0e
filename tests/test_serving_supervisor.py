"""The supervisor's decisions, with a server and a clock that the test moves."""

from __future__ import annotations

import json
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

from pipeline import procs, status
from pipeline.errors import UserError
from pipeline.run import endpoint, service_metrics
from pipeline.run.directory import RunDir
from pipeline.serving import supervisor, wire
from pipeline.serving.model_store import KnownAnswer, Manifest
from pipeline.serving.server import free_port, make_spec
from pipeline.serving.shared_memory import region_prefix, sweep
from pipeline.serving.supervisor import Supervisor
from pipeline.serving.usage import Meter, Traffic, Usage, traffic_row

MANIFEST = Manifest(
    "id", "rm", "/rm", "w", "t", "float32", 64, 1, {}, {"max_difference": 0.0}, [KnownAnswer([1, 2], 0.5)], 1e-3
)


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
        self.fate = None

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

    def check(self, manifest: Manifest, timeout_s: float) -> float:
        self.log.append("check")
        return 0.0

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


class Story:
    """A supervisor with its fake server, clock and run directory."""

    def __init__(self, root: Path) -> None:
        self.run, self.server, self.clock = RunDir(root), FakeServer(), Clock()
        self.supervisor = Supervisor(
            self.run,
            self.server,
            MANIFEST,
            serving_config().serving,
            "job7",
            self.clock,  # type: ignore[arg-type]
        )

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
    monkeypatch.setattr(wire, "read_rewards", lambda result, count: [result])
    story.supervisor.start()
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


def healthy_canary(story: Story) -> None:
    """Let time pass until the supervisor asks, and give the known answer."""
    story.tick(supervisor.CANARY_S)
    assert story.server.canary is not None
    story.server.canary(SimpleNamespace(as_numpy=lambda name: np.array([[0.5]], np.float32)), None)
    story.tick()


def test_what_the_server_did_is_recorded_when_others_asked_it(story: Story) -> None:
    story.supervisor.start()
    story.server.usage = Usage(requests=2, sequences=3, executions=2)  # the check, and the question that follows
    healthy_canary(story)
    assert service_metrics.last(story.run) is None
    assert service_metrics.describe(story.run) == ""
    story.server.usage = Usage(requests=43, failed=1, sequences=123, executions=22, queue_s=0.41, compute_s=0.82)
    healthy_canary(story)
    row = service_metrics.last(story.run)
    assert row is not None
    assert (row["requests"], row["failed"], row["sequences"], row["executions"]) == (41, 1, 120, 20)
    assert (row["batch_mean"], row["queue_ms"], row["compute_ms"]) == pytest.approx((6.0, 10.0, 20.0))
    assert (row["seconds"], row["reward_model"], row["server"]) == (supervisor.CANARY_S + 1, "id", 0)
    assert service_metrics.describe(story.run) == "rewards: 2.6 requests/s, 6.0 sequences an execution, queue 10.0 ms"

    story.server.usage = replace(story.server.usage, requests=53, sequences=133, executions=32)
    story.supervisor.stop()  # counts what came since, too
    row = service_metrics.last(story.run)
    assert row is not None and row["requests"] == 10


def test_the_status_shows_what_a_published_server_does(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    story.run.config.write_text("{}\n")
    trained = {"step": 4, "reward_server/padding": 0.034, "reward_server/tokens_per_second": 5120.4}
    story.run.metrics.write_text(json.dumps(trained) + '\n{"step": 4}\n{"cut sho')
    story.supervisor.start()
    story.server.usage = Usage(requests=34, sequences=64, executions=16, queue_s=0.034)
    healthy_canary(story)
    assert status.main([str(story.run.root)]) == 0
    line = "rewards: 2.1 requests/s, 4.0 sequences an execution, queue 1.0 ms, 5120 tokens/s, 3.4 % padding"
    assert line in capsys.readouterr().out.splitlines()
    story.supervisor.stop()
    status.main([str(story.run.root)])
    assert "rewards" not in capsys.readouterr().out


def test_a_restarted_server_counts_from_nothing_again(story: Story) -> None:
    story.supervisor.start()
    story.server.usage = Usage(requests=1000, sequences=1000, executions=1000)
    healthy_canary(story)
    story.server.fate = "was killed by signal 9"
    story.tick()
    story.tick(0.6)
    story.tick()
    story.server.usage = Usage(requests=7, sequences=14, executions=7)
    healthy_canary(story)
    row = service_metrics.last(story.run)
    assert row is not None and (row["requests"], row["sequences"]) == (7, 14)


def test_clients_count_tokens_and_padding() -> None:
    meter = Meter()
    with meter.request([4, 2]), meter.request([8]):
        pass
    taken = meter.take()
    assert (taken.requests, taken.sequences, taken.tokens, taken.padded, taken.in_flight) == (2, 3, 14, 16, 2)
    assert 0.0 < taken.busy_s <= taken.latency_s
    assert meter.take() == Traffic()
    figures = traffic_row([replace(taken, busy_s=2.0), Traffic(), replace(taken, busy_s=7.0, latency_s=0.5)])
    assert figures["tokens_per_second"] == 14 / 2 + 14 / 7
    assert (figures["padding"], figures["requests"], figures["in_flight"]) == (1 - 14 / 16, 4, 2)
    assert traffic_row([Traffic()]) == {}


def test_the_heartbeat_goes_on_while_the_server_is_down(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    story.supervisor.start()
    story.server.fate = "was killed by signal 9"
    monkeypatch.setattr(time, "time", lambda: 5e9)
    story.tick(supervisor.BEAT_S)
    story.tick(supervisor.BEAT_S)
    assert story.published is not None
    assert story.published.heartbeat == 5e9


def test_a_taken_port_is_noticed_before_anything_starts() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"serving\.grpc_port: {port} cannot be bound"):
            make_spec(serving_config(bind="loopback", grpc_port=port).serving, Path("/store"), ["7"], Path("/tls"))
    assert free_port() > 0


def test_the_socket_is_in_a_folder_that_only_we_can_enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 30)))
    Path(tempfile.gettempdir()).mkdir()
    spec = make_spec(serving_config(bind="unix").serving, Path("/store"), ["7"])
    folder = spec.socket_folder
    assert folder is not None
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(f"{folder}/rm.sock:8001") < 108
    assert list(Path(tempfile.gettempdir()).iterdir()) == []
    folder.rmdir()


def test_only_own_regions_and_those_of_dead_supervisors_are_swept(tmp_path: Path) -> None:
    import mmap

    here, store = procs.this_process(), Path("/a/store")
    alive, own = region_prefix(here, store), region_prefix(here, store)
    reused = region_prefix(replace(here, start=here.start + 1), store)  # the pid now belongs to another process
    gone = region_prefix(replace(here, pid=2**22 + 1), store)  # above the kernel's largest pid
    elsewhere = gone.replace(gone.split("_")[2], "1")  # of a container whose processes cannot be seen
    kept = [f"{own}mapped", f"{alive}1", f"{elsewhere}1", "triton_python_backend_shm_region_1", "else"]
    for name in (*kept, f"{own}1", f"{reused}1", f"{gone}1"):
        (tmp_path / name).write_bytes(b"x" * 4096)
    with (tmp_path / f"{own}mapped").open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert sweep(own, tmp_path) == sorted([f"{own}1", f"{reused}1", f"{gone}1"])
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


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
