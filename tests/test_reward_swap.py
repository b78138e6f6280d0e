"""Changing a run's reward model: what is announced, and which server serves it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_swap import converted

from pipeline.errors import UserError
from pipeline.run import reward_models
from pipeline.run.directory import RunDir
from pipeline.serving import service
from pipeline.serving.service import Service


class FakeSupervisor:
    """A server that is up when the test says so."""

    def __init__(self, identity: str, before_publishing: Callable[[], None], log: list[str]) -> None:
        self.identity, self.log = identity, log
        self._before_publishing = before_publishing
        self.up = False
        self.fault: str | None = None
        self.loads = True
        self.idle_s = 0.0
        self.restarts = 0
        self.triton_host = f"unix:/{identity}"

    def start(self, wait: bool = True) -> None:
        self.log.append(f"start {self.identity}")

    def tick(self) -> None:
        if self.fault is not None:
            raise UserError(self.fault)
        if self.loads and not self.up:
            self._before_publishing()
            self.up = True

    def retire(self) -> None:
        self.log.append(f"retire {self.identity}")

    def reinstate(self) -> None:
        self.log.append(f"reinstate {self.identity}")

    def stop(self) -> None:
        self.log.append(f"stop {self.identity}")
        self.up = False


class Story:
    """A run that converted model "a", its service, and a clock that the test moves."""

    def __init__(self, root: Path) -> None:
        self.run = RunDir(root)
        self.now = 0.0
        self.log: list[str] = []
        self.servers: dict[str, FakeSupervisor] = {}
        converted(self.run, "a", self.store("a"))
        self.service = Service(self.run, self._make, lambda: self.now)
        self.service.start(wait=False)
        self.tick()

    def store(self, name: str) -> Path:
        path = self.run.root / "stores" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _make(self, store: Path, before_publishing: Callable[[], None]) -> Any:
        self.servers[store.name] = FakeSupervisor(store.name, before_publishing, self.log)
        return self.servers[store.name]

    def tick(self, count: int = 1) -> None:
        for _ in range(count):
            self.now += 1.0
            self.service.tick()


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path)


def test_the_latest_announcement_counts_while_the_run_has_the_model_that_it_was_made_for(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert reward_models.expected(run) is None
    converted(run, "a", tmp_path)
    assert (reward_models.expected(run), reward_models.store_of(run)) == ("a", tmp_path)
    reward_models.announce(run, "b", tmp_path / "b")
    with pytest.raises(UserError, match="the announced model store is gone"):
        reward_models.store_of(run)
    latest = reward_models.announce(run, "c", tmp_path)
    assert (reward_models.expected(run), latest.number) == ("c", 2)
    reward_models.fail(run, latest, "out of memory")
    assert (reward_models.expected(run), reward_models.fault(run, latest)) == ("b", "out of memory")
    converted(run, "d", tmp_path)
    assert reward_models.expected(run) == "d"


def test_the_new_server_takes_over_and_the_old_one_stays_for_those_who_use_it(story: Story) -> None:
    reward_models.use(story.run, "a")
    reward_models.announce(story.run, "b", story.store("b"))
    story.tick()
    story.servers["b"].loads = False
    assert story.log == ["start a", "start b"]
    story.tick(5)
    assert story.service.identity == "a"
    story.servers["b"].loads = True
    story.tick()
    assert story.log[2:] == ["retire a"]
    assert (story.service.identity, story.service.triton_host) == ("b", "unix:/b")
    story.servers["a"].idle_s = service.LINGER_S + 1
    story.tick()
    assert story.log[3:] == []  # the training may be between two requests
    reward_models.use(story.run, "b")
    story.servers["a"].idle_s = 1.0
    story.tick()
    assert story.log[3:] == []  # somebody else asked it just now
    story.servers["a"].idle_s = service.LINGER_S + 1
    story.tick(3)
    assert story.log[3:] == ["stop a"]
    story.service.stop()
    assert story.log[4:] == ["stop b"]


def third_model(story: Story) -> None:
    """The training is scored by "a", "b" is served beside it for long, and "c" is announced."""
    reward_models.use(story.run, "a")
    reward_models.announce(story.run, "b", story.store("b"))
    story.tick(2)
    story.servers["b"].idle_s = service.LINGER_S + 1
    reward_models.announce(story.run, "c", story.store("c"))


def test_a_third_model_takes_the_place_of_the_second_that_no_training_has_come_to_use(story: Story) -> None:
    third_model(story)
    story.tick(int(service.SETTLE_S))
    assert story.log == ["start a", "start b", "retire a"]  # a training may be about to change to "b"
    story.tick(2)
    assert story.log[3:5] == ["reinstate a", "stop b"]
    story.tick(2)
    assert story.log[5:] == ["start c", "retire a"]
    assert story.service.identity == "c" and story.service.up
    reward_models.use(story.run, "c")
    story.servers["a"].idle_s = service.LINGER_S + 1
    story.tick()
    assert story.log[7:] == ["stop a"]


def test_a_third_model_waits_while_the_second_is_asked_by_others(story: Story) -> None:
    third_model(story)
    story.servers["b"].idle_s = 0.0
    story.tick(20)
    assert story.log == ["start a", "start b", "retire a"]
    story.servers["b"].idle_s = service.LINGER_S + 1
    story.tick(3)
    assert story.log[3:] == ["reinstate a", "stop b", "start c", "retire a"]


def test_a_third_model_waits_until_the_first_ones_server_has_ended_where_the_training_uses_the_second(
    story: Story,
) -> None:
    third_model(story)
    reward_models.use(story.run, "b")
    story.tick(20)
    assert story.log == ["start a", "start b", "retire a"]
    story.servers["a"].idle_s = service.LINGER_S + 1
    story.tick(3)
    assert story.log[3:] == ["stop a", "start c", "retire b"]
    assert story.service.identity == "c"


def test_a_third_model_that_cannot_be_served_leaves_the_training_with_the_first_and_the_second_to_come(
    story: Story,
) -> None:
    third_model(story)
    story.tick(int(service.SETTLE_S) + 2)
    assert story.log[3:] == ["reinstate a", "stop b", "start c"]
    story.servers["c"].fault = "out of memory"
    story.tick(4)
    assert story.log[6:] == ["stop c", "start b", "retire a"]


def test_the_first_model_announced_again_is_served_again_though_the_second_has_its_place(story: Story) -> None:
    third_model(story)
    reward_models.announce(story.run, "a", story.store("a"))
    story.tick(int(service.SETTLE_S) + 4)
    assert story.log[3:] == ["reinstate a", "stop b"]
    assert story.service.identity == "a"


def test_a_second_model_that_still_loads_makes_room_for_a_third_at_once(story: Story) -> None:
    reward_models.announce(story.run, "b", story.store("b"))
    story.tick()
    story.servers["b"].loads = False
    story.tick(3)
    reward_models.announce(story.run, "c", story.store("c"))
    story.tick(3)
    assert story.log == ["start a", "start b", "stop b", "start c", "retire a"]


def test_a_training_that_was_killed_holds_no_server(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    reward_models.use(story.run, "a")
    reward_models.announce(story.run, "b", story.store("b"), alone=True)
    story.servers["a"].idle_s = service.LINGER_S + 1
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + reward_models.EXPIRES_S - 5)
    story.tick(3)
    assert story.log == ["start a"]
    monkeypatch.setattr(time, "time", lambda: now + reward_models.EXPIRES_S + 5)
    story.tick(3)
    assert story.log == ["start a", "stop a", "start b"]


def test_what_a_run_says_of_its_models_is_its_owners_whoever_comes_first(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        for name, say in {
            "use": lambda run: reward_models.use(run, "a"),
            "announce": lambda run: reward_models.announce(run, "b", tmp_path),
        }.items():
            run = RunDir(tmp_path / name)
            say(run)
            assert run.endpoint.parent.stat().st_mode & 0o777 == 0o700
            files = [path for path in run.endpoint.parent.rglob("*") if path.is_file()]
            assert [path.stat().st_mode & 0o777 for path in files] == [0o600]
    finally:
        os.umask(before)


def test_a_model_that_cannot_be_served_is_refused_and_the_old_one_goes_on(story: Story) -> None:
    model = reward_models.announce(story.run, "b", story.store("b"))
    story.tick()
    story.servers["b"].fault = "tritonserver ended with status 1: out of memory"
    story.tick(3)
    assert reward_models.fault(story.run, model) == "tritonserver ended with status 1: out of memory"
    assert (story.service.identity, story.log) == ("a", ["start a", "start b", "stop b"])
    reward_models.announce(story.run, "c", story.run.root / "gone")
    story.tick(3)
    assert (reward_models.expected(story.run), story.service.identity) == ("a", "a")


def test_a_model_to_be_served_alone_waits_until_the_training_has_left_the_old_one(story: Story) -> None:
    reward_models.use(story.run, "a")
    reward_models.announce(story.run, "b", story.store("b"), alone=True)
    story.tick(5)
    assert story.log == ["start a"]
    reward_models.use(story.run, "b")
    story.tick(2)
    assert story.log == ["start a", "stop a", "start b"]
    story.tick()
    assert story.service.identity == "b" and story.service.up


def test_without_a_training_a_server_in_use_is_left_to_its_clients(story: Story) -> None:
    reward_models.announce(story.run, "b", story.store("b"), alone=True)
    story.tick(3)
    assert story.log == ["start a"]
    story.servers["a"].idle_s = service.LINGER_S + 1
    story.tick(2)
    assert story.log == ["start a", "stop a", "start b"]


def test_a_retired_server_that_dies_for_good_takes_nobody_with_it(story: Story) -> None:
    reward_models.use(story.run, "a")
    reward_models.announce(story.run, "b", story.store("b"))
    story.tick(3)
    story.servers["a"].fault = "tritonserver failed 6 times in a row"
    story.tick(2)
    assert story.log[-1] == "stop a"
    assert story.service.identity == "b"
