"""A reward server by hand, a stuck one, and a change of model, with the real tritonserver."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers_jobs import ROOT, clean_environment
from helpers_serving import converted_run, save_reward_model, serving_config

from pipeline import procs, score, serve
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run import endpoint, owner, reward_models, service_metrics
from pipeline.run.directory import RunDir
from pipeline.serving import by_hand, service, supervisor, swap, wire
from pipeline.serving.client import TritonScorer, connect_scorer
from pipeline.serving.convert import convert
from pipeline.serving.engines import Engine
from pipeline.serving.known import Reference
from pipeline.serving.model_store import model_folder, read_manifest, serving_of
from pipeline.serving.pool import Place
from pipeline.serving.scorer import LocalScorer, Scorer
from pipeline.serving.service import Service, supervise

pytestmark = pytest.mark.triton

SEQUENCES = [[token, token + 1, token + 2] for token in range(1, 60)]


@pytest.fixture(scope="module")
def config() -> Config:
    return serving_config(dynamic_batching=False, bind="unix", request_timeout_s=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, config: Config) -> RunDir:
    """A run with a converted model, and the store of another one beside it, whose server takes smaller requests."""
    root = tmp_path_factory.mktemp("operated")
    run, _ = converted_run(root / "run", save_reward_model(root / "a"), config)
    small = config.serving.model_copy(update={"max_batch_size": 2, "max_batch_tokens": 64})
    convert(save_reward_model(root / "b", seed=1), root / "other_store", small)
    return run


@pytest.fixture(scope="module")
def other_store(run: RunDir) -> Path:
    return run.root.parent / "other_store"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def local_rewards(store: Path, config: Config) -> list[float]:
    """In the batches that the store's server is asked for."""
    manifest = read_manifest(store)
    serving = config.serving.model_copy(update=serving_of(manifest))
    scorer = LocalScorer(model_folder(store, manifest.model_name), serving)
    try:
        return scorer.score(SEQUENCES)
    finally:
        scorer.close()


def tick_until(server: Service, done: threading.Event | None = None) -> None:
    """Tick until the event, or else until the server is up."""
    tick_while(server, lambda: not (server.up if done is None else done.is_set()))


def tick_while(server: Service, goes_on: Callable[[], bool], limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while goes_on():
        assert time.monotonic() < deadline
        server.tick()
        time.sleep(0.05)


SLOW = """
import time
_execute = TritonPythonModel.execute
def _slowly(self, requests):
    time.sleep(0.5)
    return _execute(self, requests)
TritonPythonModel.execute = _slowly
"""


def test_by_hand_it_serves_until_it_is_told_to_stop_and_answers_what_it_was_asked(
    run: RunDir, tmp_path: Path, config: Config
) -> None:
    store = tmp_path / "a slow store"
    shutil.copytree(run.artifact("convert", "model_store"), store)
    (model,) = store.glob("*/1/model.py")
    model.write_text(model.read_text() + SLOW)
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    log = (tmp_path / "log").open("wb")
    here = procs.this_process()
    killed = owner.mark(replace(here, start=here.start + 1))  # its pid is another process's now
    for left in ("hh-serve-", "hh-triton-"):
        (folder / f"{left}{killed}").mkdir()
    served = subprocess.Popen(
        [sys.executable, "-m", "pipeline.serve", str(store), "--engine", "venv"],
        cwd=ROOT,
        env={**clean_environment(), "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    assert served.stdout is not None
    host = next((line for line in served.stdout if line.startswith("TRITON_HOST=")), "").strip()
    assert host, (tmp_path / "log").read_text()
    address = wire.parse_address(shlex.split(host)[0].partition("=")[2])
    scorer = TritonScorer(lambda: [Place(address)], config.serving, Reference(read_manifest(store).identity), 20)
    futures = [scorer.submit([sequence]) for sequence in SEQUENCES[:3]]
    time.sleep(0.3)
    served.send_signal(signal.SIGTERM)
    rewards = [future.result(60)[0] for future in futures]
    assert served.wait(60) == 0, (tmp_path / "log").read_text()
    scorer.close()
    assert rewards == pytest.approx(local_rewards(store, config)[:3], abs=1e-5)
    assert not list(folder.iterdir())  # neither its socket nor its files, nor what others left
    assert (tmp_path / "log").read_text().count("has known holes") == 1
    assert not list(Path("/dev/shm").glob(f"triton_hh_*_{served.pid}_*"))
    assert not Path(address.url.removeprefix("unix:")).parent.exists()
    folder.rmdir()


def test_by_hand_what_cannot_be_served_is_one_line(run: RunDir, tmp_path: Path, other_store: Path) -> None:
    for arguments in ([str(tmp_path)], ["--run", str(run.root), "--swap", str(tmp_path)]):
        with pytest.raises(UserError, match=rf"^{tmp_path}: not a model store.* give the folder that convert wrote"):
            serve.main(arguments)
    with pytest.raises(UserError, match=r"^--port: 99999999 is no port; give one from 1 to 65535"):
        serve.main([str(other_store), "--port", "99999999"])
    with pytest.raises(UserError, match=r"^--devices: "):
        serve.main([str(other_store), "--devices", "a,b"])
    with pytest.raises(UserError, match=r"not the reward model of .*; announce it with --swap"):
        serve.main([str(other_store), "--run", str(run.root)])
    with pytest.raises(UserError, match=r"serving\.nonsense: unknown key"):
        serve.main([str(other_store), "--set", "serving.nonsense=1"])


def test_by_hand_a_store_that_does_not_load_is_one_line_and_its_log_is_kept(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    shutil.copytree(run.artifact("convert", "model_store"), store)
    (model,) = store.glob("*/1/model.py")
    model.write_text("raise RuntimeError('the weights are gone')\n")
    monkeypatch.setattr(
        by_hand, "Stop", lambda: SimpleNamespace(asked=False)
    )  # which would take this process's signals
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(
        UserError, match=r"^tritonserver ended with status 1: .*the weights are gone.*\(log: .*\)$"
    ) as error:
        serve.main([str(store), "--engine", "venv"])
    kept = Path(str(error.value).rpartition("(log: ")[2].rstrip(")"))
    assert "the weights are gone" in kept.read_text()
    assert kept.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["store", kept.name])


@pytest.fixture(scope="module")
def server(engine: Engine, run: RunDir, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The run's server, whose supervisor looks at it often."""
    log = tmp_path_factory.mktemp("log") / "tritonserver.log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor, "CANARY_S", 0.5)
        patch.setattr(service, "LINGER_S", 2.0)
        patch.setattr(service, "SETTLE_S", 0.5)
        with supervise(run, config, engine, [], log, "job", wait=False) as server:
            tick_until(server)
            yield server
    assert endpoint.read_all(run) == []
    assert not list(Path("/dev/shm").glob(f"triton_hh_*_{os.getpid()}_*"))


def test_a_stuck_server_is_started_again_and_no_reward_is_lost(server: Service, run: RunDir, config: Config) -> None:
    """Stopped by a signal, it neither answers nor ends."""
    published = endpoint.read(run)
    assert published is not None
    before = server.restarts
    scorer = connect_scorer(run, config, {})
    for pid in procs.session_pids(published.pid):
        os.kill(pid, signal.SIGSTOP)
    asking = Asking(scorer)
    tick_until(server, asking.once)
    asking.stop()
    scorer.close()
    assert asking.failure is None and server.restarts > before
    assert asking.rewards == local_rewards(run.artifact("convert", "model_store"), config)

    def published_again() -> bool:
        """A moment after it answers on the same socket."""
        again = endpoint.read(run)
        return again is not None and again.restarts > published.restarts and again.pid != published.pid

    tick_while(server, lambda: not published_again())

    def recorded() -> bool:
        file = service_metrics.path(run)
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return sum(row["sequences"] for row in rows) >= len(SEQUENCES)

    tick_while(server, lambda: not recorded())


def test_texts_are_scored_by_the_running_server(
    server: Service, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text * 9}) + "\n" for text in "abcdefgh"))
    store = run.artifact("convert", "model_store")
    monkeypatch.delenv("TRITON_HOST", raising=False)
    score.main(["--model-store", str(store), str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "here.jsonl")])
    monkeypatch.setattr(LocalScorer, "__init__", None)  # from here on there is the server only
    ways = {"run": ["--run", str(run.root)], "store": ["--model-store", str(store)]}
    for name, way in ways.items():
        if name == "store":
            monkeypatch.setenv("TRITON_HOST", server.triton_host)
        score.main([*way, str(tmp_path / "in.jsonl"), "--out", str(tmp_path / f"{name}.jsonl")])
    files = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("here", "run", "store")]
    rewards = [[json.loads(line)["reward"] for line in lines] for lines in files]
    assert rewards[1] == pytest.approx(rewards[0], abs=1e-5) and rewards[2] == pytest.approx(rewards[0], abs=1e-5)
    assert len(set(rewards[0])) == 8


def test_a_client_that_would_ask_for_more_than_the_server_takes_asks_for_less(server: Service, run: RunDir) -> None:
    """The store was converted for requests of at most 16 sequences."""
    place = Place(wire.parse_address(server.triton_host))
    scorer = TritonScorer(lambda: [place], serving_config(max_batch_size=64, max_batch_tokens=8192).serving)
    rows = [[1 + index % 90, 2] for index in range(50)]
    assert len(set(scorer.score(rows))) == 50
    assert scorer.traffic().requests == 4
    scorer.close()


def test_another_model_is_served_beside_the_first_without_an_error_for_anyone(
    server: Service, run: RunDir, config: Config, other_store: Path
) -> None:
    store = run.artifact("convert", "model_store")
    scorer = connect_scorer(run, config, {})
    first, identity = server.triton_host, server.identity
    reward_models.use(run, identity)
    asking = Asking(scorer)
    announcing = threading.Thread(target=swap.announce, args=(run, config, other_store, False, print))
    announcing.start()
    tick_while(server, announcing.is_alive)  # the command returns when the new one is served
    asking.once.clear()
    tick_until(server, asking.once)  # the old one still answers
    assert server.identity == read_manifest(other_store).identity != identity
    assert [(one.digest, one.retiring) for one in endpoint.read_all(run)] == [
        (server.identity, False), (identity, True),
    ]  # fmt: skip
    changed = connect_scorer(run, config, {})
    assert changed.score(SEQUENCES) == local_rewards(other_store, config)
    changed.close()
    asking.stop()
    scorer.close()
    assert asking.failure is None and asking.rewards == local_rewards(store, config)
    reward_models.use(run, server.identity)
    folder = Path(wire.parse_address(first).url.removeprefix("unix:")).parent
    tick_while(server, folder.exists)
    assert [one.digest for one in endpoint.read_all(run)] == [server.identity]
    # The run remembers: the next server serves the announced model at once.
    assert reward_models.store_of(run) == other_store.resolve()


def test_a_model_that_no_training_came_to_use_gives_its_place_back_without_an_error_for_anyone(
    server: Service, run: RunDir, config: Config, other_store: Path
) -> None:
    """What a third model waits for; here the third is the first again."""
    first, identity = server.triton_host, server.identity
    assert identity == read_manifest(other_store).identity
    reward_models.use(run, identity)
    scorer = connect_scorer(run, config, {})
    asking = Asking(scorer)
    store = run.artifact("convert", "model_store")
    announcing = threading.Thread(target=swap.announce, args=(run, config, store, False, print))
    announcing.start()
    tick_while(server, announcing.is_alive)
    second = Path(wire.parse_address(server.triton_host).url.removeprefix("unix:")).parent
    assert server.identity == read_manifest(store).identity != identity
    reward_models.announce(run, identity, other_store.resolve())
    tick_while(server, second.exists)
    assert (server.triton_host, server.identity) == (first, identity)
    assert [(one.digest, one.retiring) for one in endpoint.read_all(run)] == [(identity, False)]
    asking.once.clear()
    tick_until(server, asking.once)
    asking.stop()
    scorer.close()
    assert asking.failure is None and asking.rewards == local_rewards(other_store, config)


class Asking:
    """A client that asks the same again and again, and must always get the same."""

    def __init__(self, scorer: Scorer) -> None:
        self.once = threading.Event()
        self.rewards: list[float] = []
        self.failure: BaseException | None = None
        self._scorer = scorer
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        try:
            while not self._over.is_set():
                rewards = self._scorer.score(SEQUENCES)
                assert self.rewards in ([], rewards)
                self.rewards = rewards
                self.once.set()
        except BaseException as failure:  # for the test to see
            self.failure = failure
            self.once.set()

    def stop(self) -> None:
        self._over.set()
        self._thread.join(60)
