"""Clients of real tritonservers that die, hang, move, err or become another model meanwhile: never a wrong reward."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers_faults import Running, draw, scorer_of, start, telling_reward, telling_run, telling_store, wrong_rewards
from helpers_serving import converted_run, save_reward_model, serving_config

from pipeline import procs
from pipeline.errors import UserError
from pipeline.run import endpoint
from pipeline.run.directory import RunDir
from pipeline.serving.client import TritonScorer
from pipeline.serving.engines import Engine
from pipeline.serving.sandbox import open_sandbox, prepare

pytestmark = pytest.mark.triton


@dataclass
class Stage:
    """A run with two servers of its model, and the means to start more."""

    run: RunDir
    engine: Engine
    store: Path
    other_store: Path
    """Of another model."""
    log: Path
    servers: list[Running]

    def start(self, store: Path | None = None, port: int = 0) -> Running:
        running = start(self.engine, self.run, store or self.store, self.log, port)
        self.servers.append(running)
        return running


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    root = tmp_path_factory.mktemp("clients")
    log = root / "servers.log"
    converted, _ = converted_run(root / "converted", save_reward_model(root / "rm"), serving_config(retry_timeout_s=60))
    original = converted.artifact("convert", "model_store")
    store, other = telling_store(original, root / "store"), telling_store(original, root / "other", sign=-1)
    with open_sandbox(prepare(serving_config(), log, print), log) as engine:
        stage = Stage(telling_run(root / "run", converted, store), engine, store, other, log, [])
        try:
            yield stage
        finally:
            for running in stage.servers:
                running.server.stop(grace_s=1.0)


@pytest.fixture
def pair(stage: Stage) -> Iterator[tuple[Running, Running]]:
    """Two published servers that do well; new ones where a test has ended them."""
    alive = [running for running in stage.servers if running.server.poll() is None and running.store == stage.store]
    one, other = [*alive, *(stage.start() for _ in range(2 - len(alive)))][:2]
    endpoint.withdraw(stage.run)
    for index, running in enumerate((one, other)):
        running.ready().publish(stage.run, index)
    one.fail()
    yield one, other
    one.fail()


def rewards_are_right(scorer: TritonScorer, count: int, seed: int = 0) -> bool:
    sequences = draw(count, seed)
    return scorer.score(sequences) == [telling_reward(row) for row in sequences]


def eventually(holds: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ten_thousand_samples_of_eight_processes_are_neither_lost_nor_swapped_nor_sent_through_a_proxy(
    stage: Stage, pair: tuple[Running, Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing listens
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    before = [running.rows_scored() for running in pair]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # else it cannot load in advance
    context = multiprocessing.get_context("forkserver")  # this process has used gRPC, which does not survive a fork
    context.set_forkserver_preload(["helpers_faults"])
    with ProcessPoolExecutor(8, context) as processes:
        wrong = [processes.submit(wrong_rewards, str(stage.run.root), seed, 1250) for seed in range(8)]
        assert [one.result(300) for one in wrong] == [[]] * 8
    shares = [running.rows_scored() - old for running, old in zip(pair, before, strict=True)]
    assert sum(shares) >= 10_000
    assert min(shares) > 100  # both took part, in more than known answers


def test_a_servers_model_keeps_the_memory_that_a_forward_frees(pair: tuple[Running, Running]) -> None:
    for pid in procs.session_pids(pair[0].server.pid):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert b"MALLOC_TRIM_THRESHOLD_=2147483647" in variables


def test_a_slow_answer_is_asked_for_again(stage: Stage, pair: tuple[Running, Running]) -> None:
    scorer = scorer_of(stage.run, request_timeout_s=0.5)
    pair[0].fail(seconds=1.5)
    future = scorer.submit(draw(20, 1))
    time.sleep(1.0)
    assert not future.done()
    pair[0].fail()
    assert future.result(60) == [telling_reward(row) for row in draw(20, 1)]
    scorer.close()


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"nan": True}, "not finite"),
        ({"missing": 1}, r"replied .* to \d+ sequences"),
        ({"memory": 0}, "out of memory.*even alone, a sequence of .* tokens does not fit"),
    ],
)
def test_what_is_not_one_number_a_sequence_stops_the_step_in_one_line(
    faults: dict[str, int], message: str, stage: Stage, pair: tuple[Running, Running]
) -> None:
    scorer = scorer_of(stage.run)
    pair[0].fail(**faults)
    with pytest.raises(UserError, match=f"^.*{message}.*$") as error:
        scorer.score(draw(10, 2))
    assert "\n" not in str(error.value)
    pair[0].fail()
    assert rewards_are_right(scorer, 10, 2)
    scorer.close()


def test_a_request_too_large_for_the_memory_is_halved_until_it_fits(
    stage: Stage, pair: tuple[Running, Running], caplog: pytest.LogCaptureFixture
) -> None:
    scorer = scorer_of(stage.run, max_in_flight=1)  # so that requests are not merged again
    pair[0].fail(memory=3)
    assert rewards_are_right(scorer, 40, 3)
    assert "asked for in halves: lower serving.max_batch_tokens" in caplog.text
    scorer.close()


def test_what_a_stopped_server_owes_comes_from_the_other_and_once_it_goes_on_it_is_taken_back(
    stage: Stage, pair: tuple[Running, Running]
) -> None:
    scorer = scorer_of(stage.run, request_timeout_s=1.0)
    eventually(lambda: rewards_are_right(scorer, 8) and min(running.rows_scored() for running in pair) > 0)
    os.kill(pair[1].server.pid, signal.SIGSTOP)
    try:
        assert all(rewards_are_right(scorer, 60, seed) for seed in range(5))
    finally:
        os.kill(pair[1].server.pid, signal.SIGCONT)
    before = pair[1].rows_scored()
    eventually(lambda: rewards_are_right(scorer, 60) and pair[1].rows_scored() > before + 60)
    scorer.close()


def test_closing_cancels_what_a_server_is_asked_for(stage: Stage, pair: tuple[Running, Running]) -> None:
    scorer = scorer_of(stage.run)
    pair[0].fail(seconds=3)
    future = scorer.submit(draw(60, 5))
    time.sleep(0.3)
    started = time.monotonic()
    scorer.close()
    with pytest.raises(RuntimeError, match="the scorer was closed"):
        future.result(60)
    assert time.monotonic() - started < 2.0


def test_one_of_two_servers_may_die_then_come_back_elsewhere_and_then_the_other_may(
    stage: Stage, pair: tuple[Running, Running]
) -> None:
    scorer = scorer_of(stage.run)
    calls = [draw(100, seed) for seed in range(40)]
    futures = [scorer.submit(call) for call in calls]
    futures[5].result(60)
    stub = [pid for pid in procs.session_pids(pair[1].server.pid) if pid != pair[1].server.pid]
    os.kill(max(stub), signal.SIGKILL)  # the model's process: the server calls itself ready for ever
    futures[15].result(60)
    os.kill(pair[1].server.pid, signal.SIGKILL)
    assert [future.result(60) for future in futures] == [[telling_reward(row) for row in call] for call in calls]

    moved = stage.start().ready().publish(stage.run, 1)
    assert moved.server.address != pair[1].server.address
    eventually(lambda: rewards_are_right(scorer, 60) and moved.rows_scored() > 60)
    futures = [scorer.submit(call) for call in calls]
    futures[5].result(60)
    os.kill(pair[0].server.pid, signal.SIGKILL)
    assert [future.result(60) for future in futures] == [[telling_reward(row) for row in call] for call in calls]
    scorer.close()


def test_another_model_in_a_servers_place_gives_no_reward_and_alone_it_stops_the_step(
    stage: Stage, pair: tuple[Running, Running], caplog: pytest.LogCaptureFixture
) -> None:
    scorer = scorer_of(stage.run)
    assert rewards_are_right(scorer, 60)
    port = pair[0].server.spec.grpc_port
    pair[0].server.stop(grace_s=0.0)
    stage.start(stage.other_store, port).ready()
    with caplog.at_level(logging.WARNING):
        eventually(lambda: rewards_are_right(scorer, 60) and "serves another reward model" in caplog.text)
    pair[1].server.stop(grace_s=0.0)
    endpoint.withdraw(stage.run, 1)
    with pytest.raises(UserError, match=rf"^127\.0\.0\.1:{port}/reward-model: serves another reward model \(9999.*\)"):
        eventually(lambda: rewards_are_right(scorer, 60) and False)
    scorer.close()
