"""What a server did is counted: by its supervisor, which leaves its own questions out, and by clients."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_serving_supervisor import Story, story

from pipeline import status
from pipeline.run import service_metrics
from pipeline.serving import supervisor
from pipeline.serving.usage import Meter, Traffic, Usage, traffic_row

__all__ = ["story"]  # a fixture


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
