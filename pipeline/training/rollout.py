"""Sampling responses and having them scored, at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pipeline.config.training import Generate
from pipeline.data.tokens import encode, end_id
from pipeline.training.decode import Response, decode
from pipeline.training.scoring_text import ScoringText
from pipeline.training.split import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.serving.scorer import Scorer


@dataclass
class PendingScores:
    """Scores of a chunk's responses, asked for while other responses are still being sampled.

    A request goes out whenever `group` responses have ended. What a request holds thus follows from the chunk alone
    and never from timing, so that a server that computes requests as they are sent gives the same rewards each time.
    """

    scorer: Scorer
    group: int
    _waiting: list[tuple[int, list[int]]] = field(default_factory=list)
    _sent: list[tuple[list[int], Future[list[float]]]] = field(default_factory=list)

    def add(self, row: int, sequence: list[int]) -> None:
        """Ask for the score of a finished row, now or together with the next ones."""
        self._waiting.append((row, sequence))
        if len(self._waiting) >= self.group:
            self.flush()

    def flush(self) -> None:
        """Send what waits."""
        if self._waiting:
            rows = [row for row, _ in self._waiting]
            self._sent.append((rows, self.scorer.submit([sequence for _, sequence in self._waiting])))
            self._waiting = []

    def result(self) -> list[float]:
        """The scores in row order; waits for them. Raises what the scorer raised."""
        self.flush()
        scores: dict[int, float] = {}
        for rows, future in self._sent:
            scores.update(zip(rows, future.result(), strict=True))
        return [scores[row] for row in sorted(scores)]


@dataclass(frozen=True)
class Sampler:
    """Everything that turns prompts into scored responses."""

    split: Split
    tokenizer: PreTrainedTokenizerBase
    scoring: ScoringText
    scorer: Scorer
    generate: Generate
    prompt_length: int
    """A longer prompt loses its beginning."""
    autocast: Callable[[], AbstractContextManager[None]]
    whole_weights: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around all sampling of a phase or an evaluation; every rank enters it, and at the same time."""

    def prompt_ids(self, prompt: str) -> list[int]:
        """The ids that a response is sampled behind."""
        return encode(self.tokenizer, prompt)[-self.prompt_length :]

    def sample(self, prompts: Sequence[str], generator: torch.Generator) -> tuple[list[Response], PendingScores]:
        """Sample one response a prompt; their scores are on their way when this returns."""
        pending = PendingScores(self.scorer, group=max(1, len(prompts) // 4))

        def ask(finished: list[Response]) -> None:
            for response in finished:
                pending.add(response.row, self.scoring.sequence(prompts[response.row], response))

        with self.autocast():
            responses = decode(
                self.split,
                [self.prompt_ids(prompt) for prompt in prompts],
                self.generate,
                self.scoring.stops,
                end_id(self.tokenizer),
                generator,
                on_finished=ask,
            )
        pending.flush()
        return responses, pending
