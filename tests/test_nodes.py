"""A job of several nodes: who says what to whom, and that only the first node decides how it ends."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from helpers_jobs import fake_slurm

from pipeline import procs
from pipeline.config import load
from pipeline.config.cluster import Cluster
from pipeline.config.schema import Config
from pipeline.run import atomic, endpoint, hashing
from pipeline.run.directory import RunDir
from pipeline.scheduler.options import Where, leader_lines
from pipeline.scheduler.state import recorded_state
from pipeline.scheduler.submission import Job, Submission
from pipeline.stages import execute, node_share, nodes, service
from pipeline.stages.base import Context
from pipeline.stages.execute import StageFailed, run_stage
from pipeline.stages.faults import Fault
from pipeline.stages.node_share import do_share
from pipeline.stages.nodes import Leader, Lost, Meeting, Nodes, Rendezvous, lead

BROKEN = Fault("node", "n2 is broken: No CUDA GPUs are available", "n2")
HOST = os.uname().nodename


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return RunDir(tmp_path / "run")


def demo() -> Config:
    return load.resolve({**load.load_preset("demo"), "preset": "demo"}, ())


def test_what_broke_on_a_further_node_is_the_leaders_to_answer(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    leader = Meeting(run)
    assert leader.fault(3) is None
    Meeting(run).beat(1, reason="No CUDA GPUs are available", fault=asdict(BROKEN))
    lost = leader.fault(3)
    assert lost is not None
    assert (lost.cause, str(lost)) == (BROKEN, f"node 1 ({HOST}): No CUDA GPUs are available")
    Meeting(run).beat(1, status=0)
    monkeypatch.setattr(nodes, "LOST_S", 0.0)
    silent = leader.fault(3)  # node 2 never said a word
    assert silent is not None
    assert silent.cause == Fault("killed", "node 2 has shown no life for 0 s")


def test_a_node_is_lost_when_its_word_stands_still_whatever_its_clock_says(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    leader = Meeting(run)
    for yesterday in range(5):  # seconds after 1970: by the clock it would be lost at once
        atomic.write_json(run.root / "jobs" / "meeting-7-0" / "node-1.json", {"time": yesterday, "host": "n2"})
        assert leader.fault(2) is None
        now += 100
    atomic.write_json(run.root / "jobs" / "meeting-7-0" / "node-1.json", {"time": 9e9, "host": "n2"})
    assert leader.fault(2) is None
    now += 119
    assert leader.fault(2) is None
    now += 2
    assert "node 1 has shown no life for 120 s" in str(leader.fault(2))


def test_a_node_whose_share_is_done_may_go(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "LOST_S", 0.0)
    monkeypatch.setattr(nodes, "BEAT_S", 0.0)
    follower, leader = Meeting(run), Meeting(run)
    follower.beat(1, status=0)
    follower.beat(1)  # until the leader is done, too
    assert leader.fault(2) is None
    assert leader.fault(2) is None
    follower.beat(1, reason="tritonserver failed 6 times in a row", fault=None)  # nobody asks it any more
    assert leader.fault(2) is None


def test_of_several_failures_the_one_that_another_try_may_cure_counts(run: RunDir) -> None:
    Meeting(run).beat(1, reason="connection reset by peer", fault=None)
    leader = Leader(run, 3)
    leader.look()  # the cause may lie elsewhere
    Meeting(run).beat(2, reason="gone", fault=asdict(BROKEN))
    with pytest.raises(Lost, match=r"^node 2 .*: gone$") as caught:
        leader.look()
    assert caught.value.cause == BROKEN


def test_a_failure_of_a_further_nodes_own_is_final_after_a_while(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "HEAR_S", 0.0)
    Meeting(run).beat(1, reason="ValueError: x", fault=None)
    leader = Leader(run, 2)
    with pytest.raises(Lost, match=r"^node 1 .*: ValueError: x$"):
        while True:
            leader.look()


# the leader's attempt at a stage


def attempt(run: RunDir, monkeypatch: pytest.MonkeyPatch, command: str) -> StageFailed:
    """How a stage on two nodes fails whose work on the first is a shell command."""
    monkeypatch.setattr(
        execute,
        "started_as",
        lambda stage, job, more: (["bash", "-c", command], {**os.environ, procs.ATTEMPT_MARK: str(job.out.parent)}),
    )
    context = Context(run, demo(), hashing.HashCache(run.root / "cache" / "hashes.json"))
    with pytest.raises(StageFailed) as caught:
        run_stage(context, "prefetch", "s1", "first run", nodes=Nodes(2))
    assert Meeting(run).word(0)["status"] == "ended"  # the others may go
    return caught.value


def test_a_further_nodes_failure_ends_the_leaders_work_with_its_reason_and_fault(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    Meeting(run).beat(1, reason="No CUDA GPUs are available", fault=asdict(BROKEN))
    started = time.monotonic()
    failure = attempt(run, monkeypatch, "exec sleep 600")
    assert (str(failure), failure.fault) == (f"node 1 ({HOST}): No CUDA GPUs are available", BROKEN)
    assert time.monotonic() - started < 30


def test_a_work_that_fails_because_of_a_further_node_waits_for_its_word(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def speak() -> None:
        while not list(run.root.glob("stages/prefetch/attempts/0001/stdout.log")):
            time.sleep(0.05)
        time.sleep(1)  # the leader's work has failed by then
        Meeting(run).beat(1, reason="it was killed", fault=asdict(Fault("memory", "it ran out of memory")))

    speaker = threading.Thread(target=speak)
    speaker.start()
    failure = attempt(run, monkeypatch, "echo 'RuntimeError: Connection closed by peer'; exit 1")
    speaker.join()
    assert (str(failure), failure.fault) == (
        f"node 1 ({HOST}): it was killed",
        Fault("memory", "it ran out of memory"),
    )


def test_a_work_that_knows_why_it_failed_waits_for_nobody(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "HEAR_S", 3600.0)
    failure = attempt(run, monkeypatch, "kill -9 $$")
    assert failure.fault == Fault("killed", "it was killed (signal 9)")


def test_a_further_node_that_fell_silent_is_waited_for_and_is_the_reason(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "LOST_S", 1.0)
    monkeypatch.setattr(nodes, "HEAR_S", 0.2)
    Meeting(run).beat(1)  # its last: then its whole task was killed, and this node's ranks lost it
    failure = attempt(run, monkeypatch, "echo 'RuntimeError: Connection closed by peer'; exit 1")
    assert failure.fault == Fault("killed", "node 1 has shown no life for 1 s")


def test_a_failure_of_the_leaders_own_stays_its_own(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "HEAR_S", 0.5)
    failure = attempt(run, monkeypatch, "echo 'error: train.lr: too large'; exit 1")
    assert (str(failure), failure.fault) == ("train.lr: too large", None)


def test_a_server_on_its_own_goes_on_without_that_of_a_further_node_and_says_so(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Server:
        up, triton_host = True, "h1:1/rm"

        def tick(self) -> None:
            if "goes on" in said():
                raise KeyboardInterrupt

    def said() -> str:
        state = recorded_state(run, "serve")
        return state.reason if state else ""

    @contextlib.contextmanager
    def supervised(*arguments: object, tick: procs.Tick) -> Iterator[Server]:
        Meeting(run).beat(1, reason="gone", fault=asdict(BROKEN))
        yield Server()

    monkeypatch.setattr(service, "supervised", supervised)
    with pytest.raises(KeyboardInterrupt):
        service.serve_alone(run, demo(), Submission("s1", "slurm", (Job(("serve",)),)), Nodes(2))
    assert said() == f"TRITON_HOST=h1:1/rm; goes on without node 1 ({HOST}): gone"
    assert Meeting(run).word(0)["status"] == "ended"


def test_the_server_of_a_killed_task_is_not_left_for_those_that_come_after_the_training(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = endpoint.path(run, 1)
    monkeypatch.setattr(service, "supervised", lambda *arguments, tick: contextlib.nullcontext())
    monkeypatch.setattr(service, "run_stage", lambda *arguments: atomic.write_json(left, {}))
    context = Context(run, demo(), hashing.HashCache(run.root / "cache" / "hashes.json"))
    service.serve_train(context, "s1", "first run", False, Nodes(2))
    assert not left.exists()


# a further node's task


def test_a_further_node_that_cannot_do_its_share_says_so_and_ends_well(run: RunDir) -> None:
    Meeting(run).call(Rendezvous("train", 1, "f", "127.0.0.1", 29500, devices=8))
    do_share(run, demo(), ("train",), Nodes(2, 1))  # it has no GPU here
    lost = Meeting(run).fault(2)
    assert lost is not None
    assert f"{HOST} has 0 GPUs to train on, the first node 8; ask for nodes that are alike" in str(lost)


def test_a_bug_on_a_further_node_is_told_too(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(node_share, "share_devices", fail)
    Meeting(run).call(Rendezvous("train", 1, "f", "127.0.0.1", 29500, devices=0))
    do_share(run, demo(), ("train",), Nodes(2, 1))
    assert "KeyError: 'x'" in str(Meeting(run).fault(2))


def test_a_further_node_waits_patiently_until_it_is_called_and_ends_with_the_leader(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "LOST_S", 0.0)  # it is not called yet: the leader may be at something long
    task = threading.Thread(target=do_share, args=(run, demo(), ("train",), Nodes(2, 1)))
    task.start()
    time.sleep(1)
    assert task.is_alive()
    assert lead(run, Nodes(2), lambda: "cancelled") == "cancelled"
    task.join(30)
    assert not task.is_alive()
    assert "reason" not in Meeting(run).word(1)


# the job's end


@pytest.mark.parametrize(("word", "expected"), [("done", 0), ("cancelled", 137)])
def test_a_job_whose_first_task_is_done_ends_well_whatever_became_of_the_others(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, expected: int
) -> None:
    fake_slurm(monkeypatch, tmp_path, srun="exit 137")  # of the worst task
    assert lead(run, Nodes(2), lambda: word) == word
    cluster = Cluster.model_validate({"stages": {"train": {"nodes": 2}}})
    where = Where.at(run.root, run.root / "code")
    script = "\n".join([*leader_lines(cluster, where, Job(("train",))), "srun --wait=0 'a work'"])
    assert subprocess.run(["bash", "-c", script], check=False).returncode == expected
    later = {**os.environ, "SLURM_RESTART_COUNT": "1"}  # whose first task has not said a word yet
    assert subprocess.run(["bash", "-c", script], check=False, env=later).returncode == 137
    assert (tmp_path / "calls").read_text() == "srun --wait=0 a work\n" * 2
    assert leader_lines(cluster, where, Job(("sft",))) == []


def test_a_leader_that_fails_is_not_done(run: RunDir) -> None:
    def fail() -> str:
        assert Meeting(run).word(0)["host"] == HOST  # heard at once
        raise StageFailed("no", 1)

    with pytest.raises(StageFailed):
        lead(run, Nodes(2), fail)
    assert Meeting(run).word(0)["status"] == "ended"
    assert not list(run.root.glob("jobs/meeting-7-0/done"))
