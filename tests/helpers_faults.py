"""A reward model whose rewards spell out their sequence and that fails on demand, in a real tritonserver; and clients
in processes of their own.

The store is a converted one with another scoring.py: Triton's side of it, model.py, is the project's own.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers_serving import VOCAB

from pipeline.config.load import read_config
from pipeline.run import endpoint
from pipeline.run.directory import Artifact, Outputs, RunDir
from pipeline.serving import tls, wire
from pipeline.serving.client import TritonScorer, connect_scorer
from pipeline.serving.engines import Engine
from pipeline.serving.model_store import KnownAnswer, read_manifest, write_manifest
from pipeline.serving.server import TritonServer, make_spec

SHORT = 4
"""Known questions have at most so many ids; faults are for longer sequences."""
SCORING = """
import json, math, time, zlib
from array import array
from pathlib import Path

FAULTS = Path(__file__).with_name("faults.json")


class RewardModel:
    def __init__(self, *arguments, **settings):
        pass

    def warm_up(self):
        pass

    def validate(self, sequences):
        pass

    def score(self, sequences):
        fault = json.loads(FAULTS.read_text()) if FAULTS.exists() else {}
        rewards = [SIGN * (zlib.crc32(array("i", row).tobytes()) % 2**24) / 4096 for row in sequences]
        long = [place for place, row in enumerate(sequences) if len(row) > SHORT]
        if not long:
            return rewards
        time.sleep(fault.get("seconds", 0.0))
        if len(long) > fault.get("memory", math.inf):
            raise MemoryError("CUDA out of memory")
        if fault.get("nan"):
            rewards[long[-1]] = math.nan
        return rewards[fault.get("missing", 0) :]
"""
FAKE_TORCH = "def set_num_threads(count):\n    pass\n"
"""Comes before the real one, whose import takes seconds and which this model has no use for."""


def telling_reward(tokens: Sequence[int]) -> float:
    """The telling model's reward: another number for nearly every sequence, exact in float32."""
    return zlib.crc32(array("i", tokens).tobytes()) % 2**24 / 4096


def draw(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(SHORT + 1, 128))] for _ in range(count)]


def telling_store(converted: Path, store: Path, sign: int = 1) -> Path:
    """A copy of a converted store that serves the telling model; with another sign it is another model."""
    shutil.copytree(converted, store)
    manifest = read_manifest(store)
    identity = f"{sign % 10}" * 64
    version = store / manifest.model_name / "1"
    (version / "scoring.py").write_text(f"SIGN, SHORT = {sign}, {SHORT}\n{SCORING}")
    (version / "torch.py").write_text(FAKE_TORCH)
    config = store / manifest.model_name / "config.pbtxt"
    config.write_text(config.read_text().replace(manifest.identity, identity))
    answers = [KnownAnswer(ids, sign * telling_reward(ids)) for ids in ([1], [2, 3], [4, 5, 6, 7])]
    write_manifest(store, replace(manifest, identity=identity, known_answers=answers, answer_tolerance=1e-6))
    return store


def telling_run(root: Path, source: RunDir, store: Path) -> RunDir:
    """A run whose converted model is the one in `store`."""
    run, manifest = RunDir(root), read_manifest(store)
    root.mkdir(parents=True)
    shutil.copyfile(source.config, run.config)
    (root / "model_store").symlink_to(store)
    values = {"identity": manifest.identity, "model_name": manifest.model_name}
    artifacts = {"model_store": Artifact("model_store", "0" * 64, 0)}
    run.write_outputs(Outputs("convert", "f", 1, artifacts, values))
    return run


@dataclass
class Running:
    """A tritonserver without a supervisor: what becomes of it is the test's to say."""

    server: TritonServer
    store: Path

    def ready(self) -> Running:
        self.server.wait_ready(time.monotonic() + 120)
        return self

    def publish(self, run: RunDir, index: int = 0) -> Running:
        """Say in the run that its server is here."""
        manifest, now = read_manifest(self.store), time.time()
        found = endpoint.Endpoint(
            self.server.triton_host, manifest.model_name, "1", manifest.identity, "1", os.uname().nodename,
            self.server.pid, started=now, heartbeat=now, index=index, tls=self.server.address.tls or "",
        )  # fmt: skip
        endpoint.publish(run, found)
        return self

    def fail(self, **faults: Any) -> None:
        """Have it do so from now on."""
        path = self.store / read_manifest(self.store).model_name / "1" / "faults.json"
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(faults))
        temporary.rename(path)

    def rows_scored(self) -> int:
        """How many sequences it has scored since it started."""
        client = wire.open_client(self.server.address)
        try:
            statistics = client.get_inference_statistics(self.server.address.model).model_stats[0]
        finally:
            client.close()
        return int(statistics.inference_count)


def start(engine: Engine, run: RunDir, store: Path, log: Path, port: int = 0) -> Running:
    """Start a server on a port of loopback; it is not ready yet."""
    serving = read_config(run.root).serving.model_copy(update={"bind": "loopback", "grpc_port": port})
    spec = make_spec(serving, store, [], tls.ensure(run.endpoint.parent / "tls"))
    server = TritonServer(engine, spec, read_manifest(store).model_name, log, os.environ)
    server.start()
    return Running(server, store)


def scorer_of(run: RunDir, **serving: Any) -> TritonScorer:
    """A client of the run's servers; `serving` lays over the run's settings."""
    config = read_config(run.root)
    config = config.model_copy(update={"serving": config.serving.model_copy(update=serving)})
    found = connect_scorer(run, config, {})
    assert isinstance(found, TritonScorer)
    return found


def wrong_rewards(root: str, seed: int, count: int) -> list[int]:
    """A client process's work: score `count` sequences in calls of many sizes; places of those not rewarded right."""
    rng, sequences = random.Random(seed), draw(count, seed)
    scorer = scorer_of(RunDir(Path(root)))
    futures, start_at = [], 0
    while start_at < count:
        size = rng.randint(1, 200)
        futures.append((start_at, scorer.submit(sequences[start_at : start_at + size])))
        start_at += size
    wrong = []
    for first, future in futures:
        rewards = future.result(300)
        expected = [telling_reward(row) for row in sequences[first : first + len(rewards)]]
        wrong += [first + place for place, pair in enumerate(zip(rewards, expected, strict=True)) if pair[0] != pair[1]]
    total = sum(len(future.result()) for _, future in futures)
    scorer.close()
    return wrong if total == count else [-1]
