"""Which scorer a training gets, what it knows of the right model, and what goes over the wire."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers_serving import converted_run, save_reward_model, serving_config
from test_serving_client import FakeServer, server

from pipeline.errors import UserError
from pipeline.run import endpoint
from pipeline.run.directory import RunDir
from pipeline.serving import client, wire
from pipeline.serving.client import TritonScorer, connect_scorer
from pipeline.serving.known import Reference, run_reference
from pipeline.serving.scorer import LocalScorer
from pipeline.serving.scoring import RewardModel

__all__ = ["server"]  # a fixture


@pytest.mark.parametrize(
    ("text", "url", "model"),
    [
        ("localhost:8001/gptj-rm-static", "localhost:8001", "gptj-rm-static"),
        ("10.0.0.7:8001/rm.v2", "10.0.0.7:8001", "rm.v2"),
        ("[::1]:8001/rm", "[::1]:8001", "rm"),
        ("unix:/tmp/hh-triton-a/rm.sock:8001/reward-model", "unix:/tmp/hh-triton-a/rm.sock:8001", "reward-model"),
        (" node7:1/m\n", "node7:1", "m"),
    ],
)
def test_addresses(text: str, url: str, model: str) -> None:
    assert wire.parse_address(text) == wire.Address(url, model)


@pytest.mark.parametrize(
    "text",
    ["localhost:8001", "localhost/rm", "http://localhost:8001/rm", "localhost:99999/rm", "localhost:0/rm", "a b:1/rm"],
)
def test_a_malformed_address_names_the_expected_form(text: str) -> None:
    with pytest.raises(
        UserError, match=r"^TRITON_HOST=.* expected host:port/model or unix:/path/to/socket:port/model$"
    ):
        wire.parse_address(text)


class Reply:
    def __init__(self, array: Any) -> None:
        self._array = array

    def as_numpy(self, name: str) -> Any:
        assert name == "rewards"
        return self._array


def test_replies_that_are_not_one_finite_reward_each_are_errors() -> None:
    import numpy as np

    good = np.array([[0.5], [-1.0]], dtype=np.float32)
    assert wire.read_rewards(Reply(good), 2) == [0.5, -1.0]
    for bad in (None, good[:1], good.astype(np.float64), np.zeros((0,), np.float32)):
        with pytest.raises(UserError, match="the reward server replied"):
            wire.read_rewards(Reply(bad), 2)
    for value in (math.nan, math.inf):
        with pytest.raises(UserError, match="the reward of sequence 1 is"):
            wire.read_rewards(Reply(np.array([0.0, value], dtype=np.float32)), 2)


def test_requests_are_padded_int32() -> None:
    ids, lengths = wire.request_inputs([[5, 6, 7], [8]])
    assert (ids.name(), ids.shape(), ids.datatype()) == ("input_ids", [2, 3], "INT32")
    assert (lengths.name(), lengths.shape(), lengths.datatype()) == ("lengths", [2, 1], "INT32")


def test_a_dead_host_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_CONNECT_S", 0.2)
    with pytest.raises(UserError, match=r"^127\.0\.0\.1:9/rm: no reward server answers .*check TRITON_HOST") as error:
        connect_scorer(RunDir(tmp_path), serving_config(), {"TRITON_HOST": "127.0.0.1:9/rm"})
    assert "\n" not in str(error.value)


def test_without_a_server_rewards_are_computed_here(tmp_path: Path) -> None:
    source, config = save_reward_model(tmp_path / "rm"), serving_config(max_batch_tokens=64)
    run, manifest = converted_run(tmp_path / "run", source, config)
    local = connect_scorer(run, config, {}, device="cpu")
    assert isinstance(local, LocalScorer)
    assert local.identity == manifest.identity
    sequences = [answer.tokens for answer in manifest.known_answers]
    expected = RewardModel(source, max_batch_tokens=64, max_batch_size=16).score(sequences)
    assert local.score(sequences) == expected
    local.close()


def test_a_published_server_is_used_while_it_shows_life(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = save_reward_model(tmp_path / "rm"), serving_config()
    run, manifest = converted_run(tmp_path / "run", source, config)
    monkeypatch.setattr(wire, "infer", lambda _client, _model, rows, _timeout: [known[tuple(row)] for row in rows])
    known = {tuple(answer.tokens): answer.reward for answer in manifest.known_answers}
    server.identity = manifest.identity
    now = time.time()
    alive = endpoint.Endpoint(
        "127.0.0.1:5/reward-model", "reward-model", "1", manifest.identity, "1", "h", 1, 0, now, now
    )
    endpoint.publish(run, alive)
    found = connect_scorer(run, config, {})
    assert isinstance(found, TritonScorer)
    assert server.connected_to == ["127.0.0.1:5/reward-model"]
    found.close()
    endpoint.publish(run, replace(alive, heartbeat=now - 3600))
    late = connect_scorer(run, config, {}, device="cpu")
    assert isinstance(late, LocalScorer)
    late.close()


def test_what_is_known_of_the_right_model_is_what_the_run_still_has_of_its_conversion(tmp_path: Path) -> None:
    assert run_reference(RunDir(tmp_path)) == Reference()
    run, manifest = converted_run(tmp_path / "run", save_reward_model(tmp_path / "rm"), serving_config())
    whole = run_reference(run)
    assert (whole.identity, whole.tolerance) == (manifest.identity, manifest.answer_tolerance)
    assert list(whole.answers) == manifest.known_answers
    shutil.rmtree(tmp_path / "run/model_store")  # purged, while a server elsewhere goes on
    assert run_reference(run) == Reference(manifest.identity)
