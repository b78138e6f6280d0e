"""A real tritonserver: rewards equal to the last bit, refusals, crashes under load, and nothing left behind."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers_serving import VOCAB, converted_run, save_reward_model, serving_config
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from tritonclient.utils import InferenceServerException

from pipeline import procs
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run import endpoint
from pipeline.run.directory import RunDir
from pipeline.serving import parity, tls, wire
from pipeline.serving.client import TritonScorer, connect_scorer
from pipeline.serving.engines import Engine
from pipeline.serving.known import Reference
from pipeline.serving.pool import Place
from pipeline.serving.scorer import LocalScorer
from pipeline.serving.server import TritonServer, make_spec
from pipeline.serving.service import Service as Supervised
from pipeline.serving.service import supervise

pytestmark = pytest.mark.triton
POISON = min(set(range(VOCAB)) - {token for sequence in parity.probe_sequences(VOCAB, 128) for token in sequence[:33]})
"""A token that the merging server's rewards do not survive; neither known answers nor `draw` hold it."""
SMALL_DEVICE = """

_initialize = TritonPythonModel.initialize


def _on_a_small_device(self, args):
    _initialize(self, args)

    def allocate(module, given, named):
        if named["input_ids"].numel() > 700:
            raise torch.OutOfMemoryError("no memory for so many tokens")

    self.model.model.base_model.register_forward_pre_hook(allocate, with_kwargs=True)


TritonPythonModel.initialize = _on_a_small_device
"""
"""Added to the merging server's model.py: its device has memory for 700 tokens, though its budget is 1024."""
TOKENS = [token for token in range(VOCAB) if token != POISON]


@dataclass
class Service:
    """A run with its running server."""

    run: RunDir
    config: Config
    supervisor: Supervised

    @property
    def address(self) -> wire.Address:
        published = endpoint.read(self.run)
        assert published is not None
        return wire.parse_address(published.triton_host, tls=published.tls)

    def scorer(self) -> TritonScorer:
        """A client that finds the server through the run directory."""
        found = connect_scorer(self.run, self.config, {})
        assert isinstance(found, TritonScorer)
        return found


@pytest.fixture(scope="module")
def services(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Service]]:
    """Two servers that start side by side: one for each binding and way of batching."""
    root = tmp_path_factory.mktemp("served")
    source = save_reward_model(root / "rm")
    plain = serving_config(dynamic_batching=False, bind="unix")
    merging = serving_config(dynamic_batching=True, bind="loopback", dtype="float32")
    run, _ = converted_run(root / "plain", source, plain)
    merging_run, _ = converted_run(root / "merging", source, merging)
    version = merging_run.artifact("convert", "model_store") / "reward-model/1"
    poison(version / "reward_model/model.safetensors")
    with (version / "model.py").open("a") as file:
        file.write(SMALL_DEVICE)
    with (
        supervise(run, plain, engine, [], root / "plain.log", "1", wait=False) as one,
        supervise(merging_run, merging, engine, [], root / "merging.log", "2", wait=False) as other,
    ):
        while not (one.up and other.up):
            one.tick()
            other.tick()
            time.sleep(0.1)
        yield Service(run, plain, one), Service(merging_run, merging, other)


def poison(weights: Path) -> None:
    tensors = load_file(weights)
    tensors["gpt_neox.embed_in.weight"][POISON] = float("nan")
    weights.unlink()  # it is a hard link: its other name keeps the good weights
    save_file(tensors, weights, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def service(services: tuple[Service, Service]) -> Service:
    """Each request computed as it was sent; on a unix socket."""
    return services[0]


@pytest.fixture(scope="module")
def merging(services: tuple[Service, Service]) -> Service:
    """Concurrent requests merged; on loopback TCP."""
    return services[1]


@pytest.fixture(scope="module")
def local(service: Service) -> LocalScorer:
    store = service.run.artifact("convert", "model_store")
    return LocalScorer(store / "reward-model/1/reward_model", service.config.serving)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As many threads as the server uses: sums over other splits differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.choice(TOKENS) for _ in range(rng.randint(1, 128))] for _ in range(count)]


def test_server_and_process_give_the_same_bits(service: Service, local: LocalScorer) -> None:
    scorer = service.scorer()
    for seed, count in enumerate((1, 2, 31, 64)):
        sequences = draw(count, seed)
        assert scorer.score(sequences) == local.score(sequences)
    assert scorer.identity == service.run.values("convert")["identity"]
    scorer.close()


def test_other_clients_do_not_change_a_reward(service: Service, local: LocalScorer) -> None:
    scorer, calls = service.scorer(), [draw(20, seed) for seed in range(12)]
    expected = [local.score(call) for call in calls]
    futures = [scorer.submit(call) for call in calls]
    assert [future.result() for future in futures] == expected
    scorer.close()


def test_a_call_without_sequences_asks_nothing(service: Service) -> None:
    scorer = service.scorer()
    assert scorer.score([]) == []
    with pytest.raises(ValueError, match="sequence 1 is empty: it has no reward"):
        scorer.score([[1, 2], []])
    scorer.close()


def test_an_over_long_input_is_scored_by_its_end(service: Service, local: LocalScorer) -> None:
    scorer, sequence = service.scorer(), draw(1, 3)[0] * 200
    assert len(sequence) > 128
    assert scorer.score([sequence]) == local.score([sequence[-128:]])
    scorer.close()


def test_special_tokens_written_out_in_a_text_are_tokens_like_others(service: Service) -> None:
    folder = service.run.artifact("convert", "model_store") / "reward-model/1/reward_model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["ab<pad>cd", "<pad>", "abcd<pad><pad>", "<pad>abcd"]
    sequences = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert sequences[1] == [tokenizer.pad_token_id]
    assert sequences[2][-1] == tokenizer.eos_token_id
    scorer, reference = service.scorer(), parity.load_reference(folder, "cpu")
    expected = [parity.reference_reward(reference, sequence) for sequence in sequences]
    assert scorer.score(sequences) == pytest.approx(expected, abs=1e-5)
    scorer.close()


def test_requests_of_different_widths_share_executions(merging: Service, local: LocalScorer) -> None:
    client, replies = wire.open_client(merging.address), []
    before = client.get_inference_statistics("reward-model").model_stats[0]
    sequences = [draw(1, seed)[0] for seed in range(60)]
    assert len({len(sequence) for sequence in sequences}) > 30
    arrived = threading.Semaphore(0)

    def keep(place: int, result: object, error: object) -> None:
        replies.append((place, result, error))
        arrived.release()

    for place, sequence in enumerate(sequences):
        client.async_infer("reward-model", wire.request_inputs([sequence]), partial(keep, place))
    assert all(arrived.acquire(timeout=60) for _ in sequences)
    assert [error for _, _, error in replies if error is not None] == []
    rewards = {place: wire.read_rewards(result, 1)[0] for place, result, _ in replies}
    expected = local.score(sequences)
    assert [rewards[place] for place in range(60)] == pytest.approx(expected, abs=1e-5)
    after = client.get_inference_statistics("reward-model").model_stats[0]
    assert after.inference_stats.success.count - before.inference_stats.success.count == 60
    assert after.execution_count - before.execution_count < 30
    client.close()


def test_a_server_out_of_memory_halves_its_forwards_and_says_so(merging: Service, local: LocalScorer) -> None:
    scorer, sequences = (
        merging.scorer(),
        [(sequence * 64)[:64] for sequence in draw(16, 77)],
    )  # 1024 tokens, where there is memory for 700
    assert scorer.score(sequences) == pytest.approx(local.score(sequences), abs=1e-5)
    scorer.close()
    log = merging.supervisor._current._server.log_path.read_text()
    assert re.search(r"out of memory: forwards now hold at most \d{3} tokens", log)


def test_merged_requests_agree_within_rounding(merging: Service, local: LocalScorer) -> None:
    scorer, calls = merging.scorer(), [draw(5, seed) for seed in range(20)]
    futures = [scorer.submit(call) for call in calls]
    for future, call in zip(futures, calls, strict=True):
        assert future.result() == pytest.approx(local.score(call), abs=1e-5)
    client = wire.open_client(merging.address)
    statistics = client.get_inference_statistics("reward-model").model_stats[0]
    sizes = {batch.batch_size for batch in statistics.batch_stats}
    assert max(sizes) > 5  # rows of more than one call shared an execution
    client.close()
    scorer.close()


@pytest.mark.parametrize(
    ("sequences", "lengths", "message"),
    [
        ([[1, 2, 3]], [[4]], "lengths must be within 1..3"),
        ([[1, 2, 3]], [[0]], "lengths must be within 1..3"),
        ([[1] * 129], [[129]], "sequence 0 has 129 tokens, more than 128"),
        ([[1, 2], [1, VOCAB]], [[2], [2]], "sequence 1 has a token id outside 0..96"),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_what_cannot_be_scored_is_refused_by_name(
    which: int,
    sequences: list[list[int]],
    lengths: list[list[int]],
    message: str,
    services: tuple[Service, Service],
) -> None:
    import numpy as np

    inputs = wire.request_inputs(sequences)
    inputs[1].set_data_from_numpy(np.array(lengths, dtype=np.int32))
    client = wire.open_client(services[which].address)
    with pytest.raises(InferenceServerException) as error:
        client.infer("reward-model", inputs)
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert message in error.value.message()
    client.close()


def test_a_reward_that_is_not_a_number_is_that_requests_error_alone(merging: Service, local: LocalScorer) -> None:
    scorer = merging.scorer()
    futures = [scorer.submit([[1, POISON, 3] if number == 5 else [1, 2, 3]]) for number in range(10)]
    with pytest.raises(UserError, match="server refused: INTERNAL: the model gave a reward that is not finite"):
        futures.pop(5).result()
    expected = pytest.approx(local.score([[1, 2, 3]]), abs=1e-5)
    assert all(future.result() == expected for future in futures)
    scorer.close()


def test_another_model_than_the_runs_is_refused(service: Service) -> None:
    with pytest.raises(UserError, match="serves another reward model"):
        TritonScorer(lambda: [Place(service.address)], service.config.serving, Reference("0" * 64))
    nothing = wire.Address(service.address.url, "nothing")
    with pytest.raises(UserError, match=r"/nothing: the reward server refused: .*nothing"):
        TritonScorer(lambda: [Place(nothing)], service.config.serving)


def test_the_endpoint_is_ours_alone(service: Service) -> None:
    published = endpoint.read(service.run)
    assert published is not None
    assert service.run.endpoint.stat().st_mode & 0o777 == 0o600
    socket = Path(service.address.url.removeprefix("unix:"))
    assert socket.is_socket()
    assert socket.parent.stat().st_mode & 0o777 == 0o700


def tick_until(service: Service, done: threading.Event, limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while not done.is_set():
        assert time.monotonic() < deadline
        service.supervisor.tick()
        time.sleep(0.05)


def test_a_server_killed_under_load_comes_back_and_no_reward_is_lost(service: Service, local: LocalScorer) -> None:
    scorer, calls = service.scorer(), [draw(30, seed) for seed in range(30)]
    expected = [local.score(call) for call in calls]
    futures = [scorer.submit(call) for call in calls]
    futures[3].result()
    published = endpoint.read(service.run)
    assert published is not None
    os.kill(published.pid, signal.SIGKILL)
    done = threading.Event()
    waiter = threading.Thread(target=lambda: ([future.result() for future in futures], done.set()))
    waiter.start()
    tick_until(service, done)
    waiter.join()
    assert [future.result() for future in futures] == expected
    assert service.supervisor.restarts == 1
    again = endpoint.read(service.run)
    assert again is not None
    assert (again.restarts, again.triton_host) == (1, published.triton_host)
    assert again.pid != published.pid
    scorer.close()


def test_a_store_that_does_not_load_is_one_line(engine: Engine, service: Service, tmp_path: Path) -> None:
    (tmp_path / "store/reward-model/1").mkdir(parents=True)
    config = service.run.artifact("convert", "model_store") / "reward-model/config.pbtxt"
    shutil.copy(config, tmp_path / "store/reward-model/config.pbtxt")
    (tmp_path / "store/reward-model/1/model.py").write_text("raise RuntimeError('the weights are gone')\n")
    certificates = tls.ensure(tmp_path / "tls")
    spec = make_spec(serving_config(bind="loopback").serving, tmp_path / "store", [], certificates)
    server = TritonServer(engine, spec, "reward-model", tmp_path / "log", os.environ)
    server.start()
    try:
        with pytest.raises(UserError, match=r"^tritonserver ended with status 1: .*the weights are gone.*\(log: .*\)$"):
            server.wait_ready(time.monotonic() + 30)
    finally:
        server.stop()
    assert not list(Path("/dev/shm").glob(f"{spec.shm_prefix}*"))


def test_a_client_may_start_with_its_server_and_both_leave_nothing(engine: Engine, tmp_path: Path) -> None:
    config = serving_config(dtype="bfloat16")
    run, manifest = converted_run(tmp_path / "run", save_reward_model(tmp_path / "rm", "llama"), config)
    rewards: list[float] = []
    done = threading.Event()
    with supervise(run, config, engine, [], tmp_path / "log", "job", wait=False) as running:
        environ = {endpoint.WAIT_VARIABLE: "120"}

        def ask() -> None:
            waiting = connect_scorer(run, config, environ)
            rewards.extend(waiting.score([answer.tokens for answer in manifest.known_answers]))
            waiting.close()
            done.set()

        client = threading.Thread(target=ask)
        client.start()
        tick_until(Service(run, config, running), done)
        client.join()
        tick_until_up(running)
        published = endpoint.read(run)
        assert published is not None
        regions = regions_of(published.pid)
        assert regions
    assert rewards == pytest.approx([a.reward for a in manifest.known_answers], abs=manifest.answer_tolerance)
    assert procs.session_pids(published.pid) == []
    assert not any((Path("/dev/shm") / name).exists() for name in regions)
    assert endpoint.read(run) is None
    socket = Path(wire.parse_address(published.triton_host).url.removeprefix("unix:"))
    assert not socket.parent.exists()


def test_a_training_with_a_server_waits_for_it_though_an_older_endpoint_is_published(
    engine: Engine, tmp_path: Path
) -> None:
    config = serving_config(retry_timeout_s=60)
    run, manifest = converted_run(tmp_path / "run", save_reward_model(tmp_path / "rm", "gpt_neox"), config)
    gone = f"unix:{tmp_path}/gone.sock:8001/{manifest.model_name}"
    old = endpoint.Endpoint(gone, manifest.model_name, "1", manifest.identity, "7", os.uname().nodename, 1)
    endpoint.publish(run, replace(old, heartbeat=time.time() - 3600))
    scorers: list[object] = []
    done = threading.Event()
    with supervise(run, config, engine, [], tmp_path / "log", "job", wait=False) as running:

        def ask() -> None:
            scorers.append(connect_scorer(run, config, {endpoint.WAIT_VARIABLE: "60"}))
            done.set()

        client = threading.Thread(target=ask)
        client.start()
        tick_until(Service(run, config, running), done)
        client.join()
        (found,) = scorers
        assert isinstance(found, TritonScorer)
        found.close()


def tick_until_up(running: Supervised) -> None:
    while not running.up:
        running.tick()


def regions_of(session: int) -> set[str]:
    """Names of the shared memory regions that a server's processes map."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text(errors="replace") for pid in procs.session_pids(session))
    return {path.name for path in Path("/dev/shm").glob("triton_hh_*") if path.name in maps}


def test_a_killed_server_left_no_region_behind(service: Service, merging: Service) -> None:
    mapped: set[str] = set()
    for running in (service, merging):
        published = endpoint.read(running.run)
        assert published is not None
        mapped |= regions_of(published.pid)
    assert {path.name for path in Path("/dev/shm").glob(f"triton_hh_*_{os.getpid()}_*")} == mapped
