"""The decode loop: many responses sampled side by side, each ending where its text ends.

Prompts are padded on the left; a row leaves the batch when it ends, so nobody waits for the slowest; the hidden
states at the split's cut are kept on the way, so that no later pass has to compute the trunk again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline.config.training import Generate
from pipeline.training.split import Split
from pipeline.training.stopping import StopSequences

Finish = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Response:
    """One sampled response."""

    row: int
    """Its prompt's place in the list that was decoded."""
    prompt: list[int]
    tokens: list[int]
    """Exactly the sampled ids, with the EOS or the ids that complete the stop sequence."""
    finish: Finish
    states: Tensor
    """(P + R - 1, H): hidden states at the cut of prompt and response but for the last id, which nothing follows."""


OnFinished = Callable[[list[Response]], None]


@torch.no_grad()
def decode(
    split: Split,
    prompts: Sequence[list[int]],
    generate: Generate,
    stops: StopSequences,
    end_id: int,
    generator: torch.Generator,
    on_finished: OnFinished | None = None,
) -> list[Response]:
    """Sample one response a prompt; the list is in the prompts' order.

    `on_finished` gets the responses that ended at a step, in row order, while the others go on. Which rows end
    together follows from the prompts, the weights and the generator alone, never from timing.

    Each row has its own noise (row i of a full (B, V) draw a step), whoever else is alive: two policies decoded with
    equally seeded generators face the same luck.
    """
    batch = _Batch(split, prompts, generate)
    logits = batch.prefill()
    for step in range(generate.max_new_tokens):
        noise = torch.empty(len(prompts), logits.shape[-1], device=split.device)  # (B, V)
        noise.exponential_(generator=generator)
        tokens = sample(logits, noise[batch.rows_on_device], generate)  # (b,)
        finished = batch.append(tokens, step, stops, end_id)
        if finished and on_finished is not None:
            on_finished(finished)
        if not batch.rows:
            break
        logits = batch.step(step)
    return batch.responses()


def sample(logits: Tensor, noise: Tensor, generate: Generate) -> Tensor:
    """Ids (b,) sampled from float32 softmax(logits (b, V) / temperature) under top-k and top-p.

    `noise` (b, V) is standard exponential: argmax(p / noise) is a sample of p (the exponential race, which is the
    Gumbel-max trick without the logarithms' logarithm).
    """
    scores = logits.float() / generate.temperature
    if generate.top_k or generate.top_p < 1.0:
        scores = keep_likely(scores, generate.top_k, generate.top_p)
    return (scores - noise.log()).argmax(dim=-1)


def keep_likely(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Scores (b, V) with -inf outside the `top_k` best (0: all) and outside the smallest set of mass `top_p`.

    The nucleus (Holtzman et al. 2019, arXiv:1904.09751) holds the likeliest ids up to the one that reaches the mass.
    """
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k:
        drop[:, top_k:] = True
        ordered = ordered.masked_fill(drop, -torch.inf)
    if top_p < 1.0:
        mass = ordered.softmax(dim=-1)
        drop |= (mass.cumsum(dim=-1) - mass) >= top_p
    return scores.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)


class _Batch:
    """The rows that are being decoded: tensors of the live ones, lists of all."""

    def __init__(self, split: Split, prompts: Sequence[list[int]], generate: Generate) -> None:
        if not prompts or not all(prompts):
            raise ValueError("decode needs prompts, and each must hold at least one id")
        self._split = split
        self._limit = generate.max_new_tokens
        self._prompts = [list(prompt) for prompt in prompts]
        self._sampled: list[list[int]] = [[] for _ in prompts]
        self._done: dict[int, Response] = {}
        # Longest first: the rows with much padding stand together at the end.
        self.rows = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
        self.rows_on_device = torch.tensor(self.rows, device=split.device)
        self._width = max(len(prompt) for prompt in prompts)
        self._trunk_cache = split.trunk.new_cache()
        self._top_cache = split.top.part.new_cache()

    def prefill(self) -> Tensor:  # (B, V)
        """Run the prompts; return the logits behind each one's last id."""
        padded = [[0] * (self._width - len(self._prompts[row])) + self._prompts[row] for row in self.rows]
        lengths = torch.tensor([len(self._prompts[row]) for row in self.rows])
        mask = torch.arange(self._width)[None, :] >= self._width - lengths[:, None]
        device = self._split.device
        self._mask = mask.long().to(device)  # (b, P + steps), 0 on the left padding
        positions = (self._mask.cumsum(dim=-1) - 1).clamp(min=0)
        ids = torch.tensor(padded, device=device)
        states = self._split.trunk(ids, self._mask, positions, self._trunk_cache)  # (B, P, H)
        self._next_position = lengths.to(device)  # (b,)
        starts = (self._width - lengths).tolist()
        self._prompt_states = {row: states[i, starts[i] :] for i, row in enumerate(self.rows)}
        self._step_states = states.new_empty(len(self._prompts), self._limit, *states.shape[2:])  # (B, R, H)
        return self._logits(states, positions)

    def step(self, step: int) -> Tensor:  # (b, V)
        """Feed the ids that were sampled last to the live rows; return the logits behind them."""
        ids = torch.tensor([[self._sampled[row][-1]] for row in self.rows], device=self._split.device)
        positions = self._next_position[:, None]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], dim=-1)
        states = self._split.trunk(ids, self._mask, positions, self._trunk_cache)  # (b, 1, H)
        self._step_states[self.rows_on_device, step] = states[:, 0]
        self._next_position = self._next_position + 1
        return self._logits(states, positions)

    def append(self, tokens: Tensor, step: int, stops: StopSequences, end_id: int) -> list[Response]:
        """Add one id to each live row; take the rows that ended out of the batch and return them in row order."""
        ended: dict[int, Finish] = {}
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            self._sampled[row].append(token)
            if token == end_id:
                ended[row] = "eos"
            elif stops.completed_by(self._sampled[row]):
                ended[row] = "stop"
            elif step + 1 == self._limit:
                ended[row] = "length"
        if not ended:
            return []
        finished = [self._finish(row, ended[row]) for row in sorted(ended)]
        self._keep([i for i, row in enumerate(self.rows) if row not in ended])
        return finished

    def responses(self) -> list[Response]:
        """All rows, in the prompts' order."""
        return [self._done[row] for row in range(len(self._prompts))]

    def _logits(self, states: Tensor, positions: Tensor) -> Tensor:
        top = self._split.top
        hidden = top.part(states, self._mask, positions, self._top_cache)
        logits: Tensor = top.head(hidden[:, -1])  # only the last position meets the vocabulary
        return logits

    def _finish(self, row: int, finish: Finish) -> Response:
        tokens = self._sampled[row]
        states = torch.cat([self._prompt_states.pop(row), self._step_states[row, : len(tokens) - 1]])
        self._done[row] = Response(row, self._prompts[row], tokens, finish, states)
        return self._done[row]

    def _keep(self, places: list[int]) -> None:
        """Drop all live rows but those at `places`, and the columns that are then padding in every row."""
        self.rows = [self.rows[place] for place in places]
        if not places:
            return
        index = torch.tensor(places, device=self._split.device)
        self.rows_on_device = self.rows_on_device[index]
        self._next_position = self._next_position[index]
        longest = max(len(self._prompts[row]) for row in self.rows)
        padding, self._width = self._width - longest, longest
        self._mask = self._mask[index, padding:]
        for cache in (self._trunk_cache, self._top_cache):
            _select(cache, index, padding)


def _select(cache: DynamicCache, rows: Tensor, padding: int) -> None:
    """Keep `rows` of the cache, without its first `padding` columns. Keys carry their positions already."""
    for layer in cache.layers:
        layer.keys = layer.keys[rows, :, padding:]  # (b, heads, T, D)
        layer.values = layer.values[rows, :, padding:]
