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
from pipeline.config.serving import Serving
from pipeline.errors import UserError
from pipeline.run import endpoint, owner, service_metrics
from pipeline.run.directory import RunDir
from pipeline.serving import supervisor, wire
from pipeline.serving.model_store import KnownAnswer, Manifest
from pipeline.serving.server import TritonServer, free_port, make_spec
from pipeline.serving.shared_memory import region_prefix, sweep
from pipeline.serving.supervisor import Supervisor
from pipeline.serving.usage import Meter, Traffic, Usage, traffic_row

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


def healthy_canary(story: Story) -> None:
    """Let time pass until the supervisor asks, and give the known answer."""
    story.tick(supervisor.CANARY_S)
    assert story.server.canary is not None
    story.server.canary(SimpleNamespace(as_numpy=lambda name: np.array([[0.5]], np.float32)), None)
    story.tick()


@pytest.mark.parametrize(("max_batch_size", "requests"), [(16, 1), (3, 3), (1, 7)])
def test_a_server_that_only_its_supervisor_asks_counts_as_unused(
    tmp_path: Path, max_batch_size: int, requests: int
) -> None:
    story = Story(tmp_path, max_batch_size)
    story.supervisor.start()
    assert (story.server.usage.requests, story.server.usage.sequences) == (requests, 7)
    for turn in range(1, 4):
        healthy_canary(story)
        assert story.server.usage.requests == requests + turn
    assert service_metrics.last(story.run) is None
    assert story.supervisor.idle_s == story.clock.now == 3 * (supervisor.CANARY_S + 1)
    story.server.was_asked(requests=1, sequences=1, executions=1)
    healthy_canary(story)
    assert service_metrics.last(story.run) is not None and story.supervisor.idle_s == 0.0


def test_an_own_question_that_is_counted_late_is_nobody_elses(story: Story) -> None:
    story.supervisor.start()
    checked, story.server.usage = story.server.usage, Usage()
    healthy_canary(story)
    story.server.was_asked(requests=checked.requests, sequences=checked.sequences)
    healthy_canary(story)
    assert service_metrics.last(story.run) is None


def test_what_the_server_did_is_recorded_when_others_asked_it(story: Story) -> None:
    story.supervisor.start()
    healthy_canary(story)
    assert service_metrics.describe(story.run) == ""
    story.server.was_asked(requests=40, failed=1, sequences=119, executions=19, queue_s=0.41, compute_s=0.82)
    healthy_canary(story)  # counts one more
    row = service_metrics.last(story.run)
    assert row is not None
    assert (row["requests"], row["failed"], row["sequences"], row["executions"]) == (41, 1, 120, 20)
    assert (row["batch_mean"], row["queue_ms"], row["compute_ms"]) == pytest.approx((6.0, 10.0, 20.0))
    assert (row["seconds"], row["reward_model"], row["server"]) == (supervisor.CANARY_S + 1, "id", 0)
    assert service_metrics.describe(story.run) == "rewards: 2.6 requests/s, 6.0 sequences an execution, queue 10.0 ms"

    story.server.was_asked(requests=10, sequences=10, executions=10)
    story.supervisor.stop()  # counts what came since, too
    row = service_metrics.last(story.run)
    assert row is not None and row["requests"] == 10


def test_the_status_shows_what_a_published_server_does(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    story.run.config.write_text("{}\n")
    trained = {"step": 4, "reward_server/wire_padding": 0.034, "reward_server/tokens_per_second": 5120.4}
    story.run.metrics.write_text(json.dumps(trained) + '\n{"step": 4}\n{"cut sho')
    story.supervisor.start()
    story.server.was_asked(requests=32, sequences=56, executions=14, queue_s=0.034)
    healthy_canary(story)  # with the check and this question: 34 requests, 64 sequences, 16 executions
    assert status.main([str(story.run.root)]) == 0
    line = "rewards: 2.1 requests/s, 4.0 sequences an execution, queue 1.0 ms, 5120 tokens/s"
    assert line in capsys.readouterr().out.splitlines()
    story.supervisor.stop()
    status.main([str(story.run.root)])
    assert "rewards" not in capsys.readouterr().out


def test_a_restarted_server_counts_from_nothing_again(story: Story) -> None:
    story.supervisor.start()
    story.server.was_asked(requests=1000, sequences=1000, executions=1000)
    healthy_canary(story)
    story.server.fate = "was killed by signal 9"
    story.tick()
    story.tick(0.6)
    story.tick()
    story.server.was_asked(requests=5, sequences=6, executions=5)
    healthy_canary(story)  # with the check and this question
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
    assert (figures["wire_padding"], figures["requests"], figures["in_flight"]) == (1 - 14 / 16, 4, 2)
    assert traffic_row([Traffic()]) == {}


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
    assert not owner.is_orphaned(folder.name)
    folder.rmdir()


def test_the_socket_folder_of_a_supervisor_that_was_killed_goes_with_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    here = procs.this_process()
    killed = tmp_path / f"hh-triton-{owner.mark(replace(here, start=here.start + 1))}x"  # its pid is another's now
    killed.mkdir()
    (killed / "rm.sock:8001").touch()
    spec = make_spec(serving_config(bind="unix").serving, tmp_path, [])
    assert spec.socket_folder is not None

    class Refusing:
        """Comes to no start."""

        def sweep(self) -> None:
            raise UserError("no further")

    server = TritonServer(Refusing(), spec, "rm", tmp_path / "log", {})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no further"):
        server.start()
    assert not killed.exists() and spec.socket_folder.exists()
    server.remove_socket_folder()


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
