"""The reward client: order, sizes of requests, retries, and refusing to make a reward up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from helpers_serving import serving_config
from tritonclient.utils import InferenceServerException

from pipeline.errors import UserError
from pipeline.serving import pool, wire
from pipeline.serving.client import TritonScorer, is_retriable
from pipeline.serving.known import Reference
from pipeline.serving.model_store import KnownAnswer
from pipeline.serving.pool import Place

HERE, THERE = wire.Address("127.0.0.1:1", "rm"), wire.Address("127.0.0.1:2", "rm")
Infer = Callable[[Sequence[Sequence[int]]], list[float]]


KNOWN = (KnownAnswer([1, 2, 3], 6.0), KnownAnswer([4], 4.0))


class FakeServer:
    """Stands in for the network: answers with each row's sum unless told otherwise."""

    def __init__(self) -> None:
        self.identity: str | None = "abc"
        self.offset = 0.0
        self.tells = True
        """Whether its replies say which model gave them; a graph's do not."""
        self.faults: list[InferenceServerException] = []
        self.limits: dict[str, dict[str, str]] = {}
        """What the model's configuration at an url says of how much a request may hold."""
        self.down: set[str] = set()
        """Urls at which nobody answers."""
        self.requests: list[list[list[int]]] = []
        self.asked: list[str] = []
        """The url of each request that was answered."""
        self.connected_to: list[str] = []
        self.closed: list[str] = []

    def open_client(self, address: wire.Address) -> Any:
        self.connected_to.append(str(address))
        return FakeClient(self, address.url)

    def served_parameters(self, client: Any, _model: str, _timeout: float) -> dict[str, str]:
        self.check(client)
        identity = {"identity": self.identity} if self.identity else {}
        return {"dtype": "float32", **identity, **self.limits.get(client.url, {})}

    def infer(self, client: Any, _model: str, rows: list[list[int]], _timeout: float) -> list[float]:
        self.check(client)
        if len(rows) > int(self.limits.get(client.url, {}).get("max_batch_size", len(rows))):
            raise fault("INVALID_ARGUMENT", "batch-size must be smaller")
        known = any(row == answer.tokens for row in rows for answer in KNOWN)
        if self.faults and not known:
            raise self.faults.pop(0)
        if not known:
            self.requests.append(rows)
            self.asked.append(client.url)
        return [float(sum(row)) + self.offset for row in rows]

    def ask(self, client: Any, model: str, rows: list[list[int]], timeout: float) -> wire.Reply:
        return wire.Reply(self.infer(client, model, rows, timeout), wire.mark_of(self.identity) if self.tells else None)

    def check(self, client: Any) -> None:
        if client.url in self.down:
            raise fault("UNAVAILABLE", "nobody is there")


class FakeClient:
    def __init__(self, server: FakeServer, url: str) -> None:
        self.server, self.url = server, url

    def close(self) -> None:
        self.server.closed.append(self.url)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    fake = FakeServer()
    for name in ("open_client", "served_parameters", "infer", "ask"):
        monkeypatch.setattr(wire, name, getattr(fake, name))
    monkeypatch.setattr(pool, "_LONGEST_PAUSE_S", 0.02)
    monkeypatch.setattr(pool, "LOOK_S", 0.02)
    yield fake


def scorer(identity: str | None = None, **serving: Any) -> TritonScorer:
    return at(HERE, identity=identity, **serving)


def at(*addresses: wire.Address, identity: str | None = None, **serving: Any) -> TritonScorer:
    """A client of the servers at `addresses`."""
    places = [Place(address) for address in addresses]
    return TritonScorer(lambda: places, serving_config(**serving).serving, Reference(identity, KNOWN, 1e-3))


def fault(status: str, message: str = "x") -> InferenceServerException:
    return InferenceServerException(message, status=f"StatusCode.{status}")


def test_rewards_come_back_in_order_whatever_the_batches(server: FakeServer) -> None:
    sequences = [[index + 1] * (1 + index * 7 % 23) for index in range(40)]
    with_batches = scorer(max_batch_size=3, max_batch_tokens=40)
    assert with_batches.score(sequences) == [float(sum(sequence)) for sequence in sequences]
    assert all(len(rows) <= 3 and len(rows) * max(map(len, rows)) <= 40 for rows in server.requests)
    assert with_batches.score([]) == []
    with_batches.close()


ROWS = [[index + 1] * (1 + index % 5) for index in range(8)]


def shapes(server: FakeServer) -> list[tuple[int, int]]:
    """Sequences and tokens of each request, the longest sequence counting for all."""
    return [(len(rows), len(rows) * max(map(len, rows))) for rows in server.requests]


def test_a_server_that_takes_less_than_the_client_asks_for_is_asked_for_less(server: FakeServer) -> None:
    server.limits[HERE.url] = {"max_batch_size": "3", "max_batch_tokens": "9"}
    asked = scorer("abc", max_batch_size=16, max_batch_tokens=1024)
    assert asked.score(ROWS) == [float(sum(row)) for row in ROWS]
    assert all(rows <= 3 for rows, _ in shapes(server))
    assert all(sum(map(len, rows)) <= 9 for rows in server.requests)
    asked.close()


def test_a_server_that_takes_more_is_asked_for_what_the_client_is_to_ask(server: FakeServer) -> None:
    server.limits[HERE.url] = {"max_batch_size": "64", "max_batch_tokens": "8192"}
    asked = scorer("abc", max_batch_size=4)
    asked.score(ROWS)
    assert [rows for rows, _ in shapes(server)] == [4, 4]
    asked.close()


def test_a_graph_of_another_run_is_asked_within_its_budget_padding_included(server: FakeServer) -> None:
    """The client does not know beforehand that it is one; unpadded, all of these would be one request."""
    server.limits[HERE.url] = {"backend": "pytorch", "max_batch_size": "16", "max_batch_tokens": "24"}
    asked = scorer("abc", flavour="python")
    lengths = (20, 1, 1, 1)
    assert asked.score([[7] * length for length in lengths]) == [140.0, 7.0, 7.0, 7.0]
    assert sorted(shapes(server)) == [(1, 20), (3, 3)]
    asked.close()


def test_a_request_that_was_cut_before_is_cut_again_for_a_server_that_takes_less(server: FakeServer) -> None:
    """The first server was lost while it was to answer, and what it was asked is too much for the other."""
    server.limits = {THERE.url: {"max_batch_size": "3"}}
    server.down = {THERE.url}
    asked = at(HERE, THERE, identity="abc")
    assert asked.score(ROWS) == [float(sum(row)) for row in ROWS]
    server.down = {HERE.url}
    assert asked.score(ROWS) == [float(sum(row)) for row in ROWS]
    assert [rows for rows, _ in shapes(server)] == [8, 3, 3, 2]
    assert server.asked == [HERE.url, *[THERE.url] * 3]
    asked.close()


def test_the_known_questions_are_cut_for_a_small_server_too(server: FakeServer) -> None:
    server.limits[HERE.url] = {"max_batch_size": "1"}
    asked = scorer("abc")
    assert asked.score([[5], [6]]) == [5.0, 6.0]
    asked.close()
    foreign = TritonScorer(lambda: [Place(HERE)], serving_config().serving)
    assert foreign.score([[5], [6]]) == [5.0, 6.0]
    foreign.close()


def test_long_sequences_lose_their_beginning_and_empty_ones_are_refused(server: FakeServer) -> None:
    short = scorer(max_length=4)
    short.score([[1, 2, 3, 4, 5, 6]])
    assert server.requests == [[[3, 4, 5, 6]]]
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        short.submit([[1], []])
    short.close()


@pytest.mark.parametrize(
    ("status", "message", "retriable"),
    [
        ("UNAVAILABLE", "failed to connect to all addresses", True),
        ("UNAVAILABLE", "This protocol is restricted, expecting header 'triton-grpc-protocol-x'", False),
        ("CANCELLED", "GRPC server is shutting down", True),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", True),
        ("INTERNAL", "Stub process 'rm_0_0' is not healthy.", True),
        ("INTERNAL", "scoring failed: RuntimeError", False),
        ("INVALID_ARGUMENT", "lengths must be within 1..4", False),
        ("NOT_FOUND", "unknown model", False),
        ("NOT_FOUND", "Request for unknown model: 'rm' has no available versions", True),  # it drains
        ("NOT_FOUND", "Request for unknown model: 'rm' is not found", False),
    ],
)
def test_only_what_a_restart_explains_is_retried(status: str, message: str, retriable: bool) -> None:
    assert is_retriable(fault(status, message)) is retriable


def test_a_passing_outage_is_waited_out_and_the_server_is_looked_up_again(server: FakeServer) -> None:
    places = [Place(HERE)]
    moved = TritonScorer(lambda: places, serving_config().serving, Reference("abc", KNOWN))
    server.faults = [fault("UNAVAILABLE"), fault("INTERNAL", "Stub process is not healthy")]
    assert moved.score([[1, 2], [3]]) == [3.0, 3.0]
    assert server.connected_to == ["127.0.0.1:1/rm"] * 3  # anew after each fault
    places[:] = [Place(THERE)]
    server.down = {HERE.url}
    assert moved.score([[5]]) == [5.0]
    assert server.asked[-1] == THERE.url
    moved.close()


def test_other_errors_fail_at_once_with_one_line(server: FakeServer) -> None:
    server.faults = []
    asked = scorer()
    server.faults = [fault("INTERNAL", "scoring failed:\n out of memory")]
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1/rm: the reward server refused: INTERNAL: scoring failed: out"):
        asked.score([[1]])
    assert asked.score([[2]]) == [2.0]
    asked.close()


def test_patience_ends(server: FakeServer) -> None:
    asked = scorer(retry_timeout_s=0.05)
    server.faults = [fault("UNAVAILABLE", "Socket closed")] * 100
    with pytest.raises(UserError, match=r"no reward .*UNAVAILABLE: Socket closed\)"):
        asked.score([[1], [2]])
    server.down = {HERE.url}
    with pytest.raises(UserError, match=r"no reward server answers there since .* \(UNAVAILABLE: nobody is there\)"):
        asked.score([[1]])
    asked.close()


def test_a_request_that_ends_each_server_it_meets_is_given_up_though_servers_are_expected(server: FakeServer) -> None:
    serving = serving_config(retry_timeout_s=60).serving
    asked = TritonScorer(lambda: [Place(HERE)], serving, Reference("abc", KNOWN), expected=lambda: True)
    server.faults = [fault("INTERNAL", "Stub process is not healthy")] * 100
    with pytest.raises(UserError, match="1 sequences got no reward in 10 tries"):
        asked.score([[1]])
    asked.close()


def test_a_request_too_large_for_the_servers_memory_is_asked_for_in_halves(server: FakeServer) -> None:
    asked = scorer()
    server.faults = [fault("INTERNAL", "CUDA out of memory. Tried to allocate"), fault("INTERNAL", "OutOfMemoryError")]
    assert asked.score([[9, row] for row in range(7)]) == [9.0 + row for row in range(7)]
    assert sorted(map(len, server.requests)) == [2, 2, 3]
    server.faults = [fault("INTERNAL", "out of memory")] * 10
    with pytest.raises(UserError, match=r"refused: .* even alone, a sequence of 2 tokens does not fit"):
        asked.score([[1, 9], [2, 9]])
    asked.close()


def test_another_reward_model_is_refused(server: FakeServer) -> None:
    assert scorer("abc").identity == "abc"
    with pytest.raises(UserError, match="serves another reward model"):
        scorer("def")
    server.identity = None
    with pytest.raises(UserError, match=r"another reward model \(without an identity\)"):
        scorer("def")
    assert scorer(None).identity is None


def test_a_server_that_answers_known_questions_wrongly_is_refused(server: FakeServer) -> None:
    server.offset = 0.01
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1/rm: rewards are off by 0\.01 from the known answers \(0\.001"):
        scorer("abc")


@pytest.mark.parametrize("tells", [True, False])
def test_another_model_behind_the_same_connection_gives_no_reward(server: FakeServer, tells: bool) -> None:
    server.tells = tells
    asked = scorer("abc")
    server.identity = "def"  # gRPC connects to the new server by itself, and nothing fails
    with pytest.raises(UserError, match="serves another reward model"):
        asked.score([[1]])
    asked.close()


def test_a_foreign_server_is_held_to_the_answers_that_it_gave_first(server: FakeServer) -> None:
    asked = TritonScorer(lambda: [Place(HERE)], serving_config().serving)
    assert (asked.identity, asked.score([[7]])) == ("abc", [7.0])
    server.faults, server.offset = [fault("UNAVAILABLE")], 0.5
    with pytest.raises(UserError, match=r"rewards are off by 0\.5 from the known answers"):
        asked.score([[7]])
    asked.close()


def test_servers_share_the_load_and_one_that_fails_is_taken_back_once_it_answers(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = at(HERE, THERE, identity="abc", max_batch_size=1, max_in_flight=2)
    eventually(lambda: len(server.connected_to) == 2)
    inside = threading.Barrier(2, timeout=20)
    ask = wire.ask

    def together(*arguments: Any) -> wire.Reply:
        inside.wait()
        return ask(*arguments)

    def urls(count: int) -> set[str]:
        assert asked.score([[9]] * count) == [9.0] * count
        return set(server.asked[-count:])

    monkeypatch.setattr(wire, "ask", together)  # two at a time: the second goes where there is less to do
    eventually(lambda: urls(8) == {HERE.url, THERE.url})
    monkeypatch.setattr(wire, "ask", ask)
    server.down = {THERE.url}
    assert urls(8) == {HERE.url}
    server.down = set()
    eventually(lambda: THERE.url in urls(8))
    asked.close()


def eventually(holds: Callable[[], bool], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_closing_fails_what_is_under_way(server: FakeServer) -> None:
    asked = scorer(retry_timeout_s=60)
    server.faults = [fault("UNAVAILABLE")] * 10_000
    future = asked.submit([[1]])
    time.sleep(0.05)
    asked.close()
    with pytest.raises(RuntimeError, match="closed"):
        future.result(5)
    with pytest.raises(RuntimeError, match="closed"):
        asked.submit([[1]])
