"""Rewards for token sequences, asynchronously: what the trainers ask, whoever computes it."""

from __future__ import annotations

import logging
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pipeline.config.serving import Serving
from pipeline.serving.cuts import MAX_PADDING, fill, pack
from pipeline.serving.usage import Meter, Traffic
from pipeline.serving.wire import check_finite

logger = logging.getLogger(__name__)


class Scorer(Protocol):
    """Gives each token sequence its reward: the reward model's score at the sequence's last token."""

    @property
    def identity(self) -> str | None:
        """Which reward model this is (the model store's identity), where known."""

    def submit(self, sequences: Sequence[Sequence[int]]) -> Future[list[float]]:
        """Start scoring and return at once; the future gives one finite reward a sequence, in order, or raises.

        A sequence longer than `serving.max_length` loses its beginning. Raises ValueError for an empty sequence.
        """

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """`submit` and wait."""

    def traffic(self) -> Traffic:
        """What was asked for since the last call of this."""

    def close(self) -> None:
        """Give up what is under way and release threads, connections and the model."""


class BatchScorer(ABC):
    """Cuts each call into micro-batches and lets worker threads score them, largest first.

    How a call is cut depends on that call's sequences alone, never on timing or other calls, so that the same call
    is computed in the same batches every time and everywhere.
    """

    def __init__(self, serving: Serving, identity: str | None, workers: int) -> None:
        self._serving = serving
        self._identity = identity
        self._closed = threading.Event()
        self._meter = Meter()
        self._waiting: queue.SimpleQueue[tuple[_Call, list[int]] | None] = queue.SimpleQueue()
        self._threads = [
            # Daemons: a trainer that fails must be able to exit while a request is being retried.
            threading.Thread(target=self._work, name=f"reward-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def identity(self) -> str | None:
        """See `Scorer`."""
        return self._identity

    def submit(self, sequences: Sequence[Sequence[int]]) -> Future[list[float]]:
        """See `Scorer`."""
        if self._closed.is_set():
            raise RuntimeError("the scorer is closed")
        rows = clip(sequences, self._serving.max_length)
        batches = cut([len(row) for row in rows], self._serving)
        call = _Call(rows, [0.0] * len(rows), len(batches))
        call.future.set_running_or_notify_cancel()  # from now on it cannot be cancelled
        if not batches:
            call.future.set_result([])
        for batch in batches:
            self._waiting.put((call, batch))
        return call.future

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """See `Scorer`."""
        return self.submit(sequences).result()

    def traffic(self) -> Traffic:
        """See `Scorer`."""
        return self._meter.take()

    def close(self) -> None:
        """See `Scorer`. Calls that are not done fail with RuntimeError."""
        self._closed.set()
        for _ in self._threads:
            self._waiting.put(None)

    @abstractmethod
    def _score_batch(self, rows: list[list[int]]) -> list[float]:
        """Rewards of one micro-batch; called by the worker threads."""

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            call, batch = item
            if call.future.done():  # another of its batches failed
                continue
            try:
                if self._closed.is_set():
                    raise RuntimeError("the scorer was closed")
                rows = [call.rows[index] for index in batch]
                with self._meter.request([len(row) for row in rows]):
                    rewards = self._score_batch(rows)
            except Exception as error:  # handed to whoever waits for the result
                call.fail(error)
            else:
                call.deliver(batch, rewards)


@dataclass
class _Call:
    """One call's rows, and its rewards as they come in."""

    rows: list[list[int]]
    rewards: list[float]
    missing: int
    """Micro-batches that are not in yet."""
    future: Future[list[float]] = field(default_factory=Future)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def deliver(self, batch: list[int], rewards: list[float]) -> None:
        with self.lock:
            for index, reward in zip(batch, rewards, strict=True):
                self.rewards[index] = reward
            self.missing -= 1
            if self.missing == 0 and not self.future.done():
                self.future.set_result(self.rewards)

    def fail(self, error: Exception) -> None:
        with self.lock:
            if not self.future.done():
                self.future.set_exception(error)


class LocalScorer(BatchScorer):
    """Scores in this process, with the server's own code, where there is no server."""

    def __init__(self, folder: Path, serving: Serving, device: str = "cpu", identity: str | None = None) -> None:
        """Load the reward model in `folder` (Hugging Face format) in `serving.dtype`."""
        from pipeline.serving.scoring import RewardModel  # torch, which a client of a server does without

        self._model = RewardModel(
            folder,
            device,
            serving.dtype,
            max_length=serving.max_length,
            max_batch_tokens=serving.max_batch_tokens,
            max_batch_size=serving.max_batch_size,
            attention=serving.attention,
        )
        super().__init__(serving, identity, workers=1)

    def _score_batch(self, rows: list[list[int]]) -> list[float]:
        rewards = self._model.score(rows)
        check_finite(rewards)
        return rewards


def cut(lengths: Sequence[int], serving: Serving) -> list[list[int]]:
    """How a call is cut into requests: a graph computes a request's padding as well, the flavour python does not."""
    if serving.flavour == "torchscript":
        return pack(lengths, serving.max_batch_tokens, serving.max_batch_size, MAX_PADDING)
    return fill(lengths, serving.max_batch_tokens, serving.max_batch_size)


def refit(rows: Sequence[Sequence[int]], serving: Serving) -> list[list[int]]:
    """How a request that was cut before is cut for a server with `serving`: not at all where it is within limits."""
    lengths = [len(row) for row in rows]
    tokens = len(rows) * max(lengths) if serving.flavour == "torchscript" else sum(lengths)
    if len(rows) <= serving.max_batch_size and tokens <= serving.max_batch_tokens:
        return [list(range(len(rows)))]
    return cut(lengths, serving)


def clip(sequences: Sequence[Sequence[int]], max_length: int) -> list[list[int]]:
    """Each sequence's last `max_length` tokens; ValueError for an empty one, which has no last token to score."""
    for index, sequence in enumerate(sequences):
        if len(sequence) == 0:
            raise ValueError(f"sequence {index} is empty: it has no reward")
    return [[int(token) for token in sequence[-max_length:]] for sequence in sequences]
