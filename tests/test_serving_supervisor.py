"""The supervisor's decisions, with a server and a clock that the test moves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers_serving import serving_config
from tritonclient.utils import InferenceServerException

from pipeline import procs
from pipeline.errors import UserError
from pipeline.run import endpoint
from pipeline.run.directory import RunDir
from pipeline.serving import supervisor, wire
from pipeline.serving.model_store import KnownAnswer, Manifest
from pipeline.serving.server import free_port, make_spec, region_prefix, sweep_shared_memory
from pipeline.serving.supervisor import Supervisor

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
        assert sweep_shared_memory(own, tmp_path) == sorted([f"{own}1", f"{reused}1", f"{gone}1"])
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
