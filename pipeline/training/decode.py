"""The decode loop: many responses sampled side by side, each ending where its text ends.

All prompts are a queue, longest first. So many as fit are decoded together; a row leaves at the step at which it ends,
and the next prompts of the queue take the free places, so that no row computes after its end and the batch stays full.
Log-probabilities of the sampled ids, and the hidden states at the split's cut, are kept on the way: no later pass has
to compute the trunk again.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.config.training import Generate
from pipeline.training.ragged import Segment, in_segments, ragged_attention, segments_of
from pipeline.training.sampling import luck_of, sample
from pipeline.training.split import Split
from pipeline.training.stopping import StopSequences

Finish = Literal["eos", "stop", "length"]

PREFILL_TOKENS = 4096
"""Prompt tokens, with padding, of one forward."""

STOP_INTERVAL = 8
"""Steps between looks at a request to stop, which may be a file on a shared disk."""


@dataclass(frozen=True)
class Response:
    """One sampled response of R ids to a prompt of P ids."""

    row: int
    """Its prompt's place in the list that was decoded."""
    prompt: list[int]
    tokens: list[int]
    """Exactly the sampled ids, with the EOS or the ids that complete the stop sequence."""
    finish: Finish
    states: Tensor
    """(P + R - 1, ...): what the trunk says of prompt and response but for the last id, which nothing follows: hidden
    states (H,) at the cut, or the ids themselves where everything is trained."""
    logprobs: Tensor
    """(R,) float32: log-probabilities of `tokens` under softmax(scores / temperature) as they were sampled."""


OnFinished = Callable[[list[Response]], None]
Adjust = Callable[[Tensor, Tensor], Tensor]
"""(logits (b, V), hidden (b, H) behind the final norm at the same place) -> scores (b, V) to sample from."""


@torch.no_grad()
def decode(
    split: Split,
    prompts: Sequence[list[int]],
    generate: Generate,
    stops: StopSequences,
    end_id: int,
    generator: torch.Generator,
    on_finished: OnFinished | None = None,
    *,
    side_by_side: int | None = None,
    adjust: Adjust | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[Response]:
    """Sample one response a prompt; the list is in the prompts' order.

    `side_by_side` rows are decoded together (None: all). `on_finished` gets the responses that ended at a step, in row
    order, while others go on; which rows end together follows from the prompts, the weights and the generator alone,
    never from timing. `adjust` changes the logits before temperature, top-k, top-p and sampling. When `stop` says so,
    between two steps, only the responses that have ended are returned.

    Each row has its own luck at each of its steps (`sampling.luck_of`), whoever else is alive: two policies decoded
    with equally seeded generators face the same, and `side_by_side` changes results by no more than float rounding.
    """
    if not prompts or not all(prompts):
        raise ValueError("decode needs prompts, and each must hold at least one id")
    waiting = deque(sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row)))
    luck = luck_of(len(prompts), generate.max_new_tokens, generator)
    batch = _Batch(split, prompts, generate, min(side_by_side or len(prompts), len(prompts)), luck)
    done: dict[int, Response] = {}
    with contextlib.closing(batch), ragged_attention(split.trunk, split.top):
        for step in itertools.count():
            if not (waiting or batch.rows) or (stop is not None and step % STOP_INTERVAL == 0 and stop()):
                break
            batch.refill(waiting)
            finished = batch.sample(stops, end_id, adjust)
            done |= {response.row: response for response in finished}
            if finished and on_finished is not None:
                on_finished(finished)
            if batch.rows:
                batch.step()
    return [done[row] for row in sorted(done)]


class _Batch:
    """The rows that are being decoded, in slots 0 to len(rows): lists for the host, tensors (b,) for the device."""

    def __init__(
        self, split: Split, prompts: Sequence[list[int]], generate: Generate, slots: int, luck: Tensor
    ) -> None:
        device = split.device
        self._split, self._prompts, self._generate, self._slots = split, prompts, generate, slots
        self._limit = generate.max_new_tokens
        self._length = max(map(len, prompts)) + self._limit - 1  # the last id of a response is fed to nobody
        self._sampled: list[list[int]] = [[] for _ in prompts]
        self._luck = luck.to(device)  # (rows, R)
        self._logprobs = torch.zeros(luck.shape, device=device)  # (rows, R)
        self._caches = split.trunk.new_cache(), split.top.part.new_cache()
        for cache in self._caches:
            cache.reserve(slots, self._length)
        config = split.whole.config
        self._eager = config._attn_implementation == "eager" and config.model_type != "gptj"
        self.rows: list[int] = []
        """The row in each slot that is taken."""
        self._lengths: list[int] = []  # positions that the slot holds
        self._segments: list[Segment] = []
        self._columns = torch.arange(max(self._length, slots), device=device)
        empty = torch.empty(0, dtype=torch.long, device=device)
        self._row = self._position = self._count = self._token = empty
        self._hidden: Tensor | None = None  # (b, H): behind the final norm, where the next ids come from
        self._states: Tensor | None = None  # (slots, length, ...): the trunk's output

    def close(self) -> None:
        """Give the memory of keys and values back."""
        for cache in self._caches:
            cache.release()

    def refill(self, waiting: deque[int]) -> None:
        """Let the next prompts of the queue in, once an eighth of the places is free: together they cost less."""
        free = min(self._slots - len(self.rows), len(waiting))
        if not free or (self.rows and free < min(max(1, self._slots // 8), len(waiting))):
            return
        new = [waiting.popleft() for _ in range(free)]
        for group in prefill_groups([len(self._prompts[row]) for row in new]):
            self._prefill([new[place] for place in group])
        self._segments = []

    def sample(self, stops: StopSequences, end_id: int, adjust: Adjust | None) -> list[Response]:
        """Add one id to each row; take the rows that ended out of the batch and return them in row order."""
        hidden = self._hidden
        assert hidden is not None
        logits: Tensor = self._split.top.head(hidden)  # (b, V)
        scores = logits if adjust is None else adjust(logits, hidden)
        self._token, logprobs = sample(scores, self._luck[self._row, self._count], self._generate)
        self._logprobs[self._row, self._count] = logprobs
        self._count = self._count + 1
        ended: dict[int, Finish] = {}
        for slot, (row, token) in enumerate(zip(self.rows, self._token.tolist(), strict=True)):
            sampled = self._sampled[row]
            sampled.append(token)
            if token == end_id:
                ended[slot] = "eos"
            elif stops.completed_by(sampled):
                ended[slot] = "stop"
            elif len(sampled) == self._limit:
                ended[slot] = "length"
        if not ended:
            return []
        finished = [self._response(slot, finish) for slot, finish in ended.items()]
        self._drop(ended)
        return sorted(finished, key=lambda response: response.row)

    def step(self) -> None:
        """Feed the ids that were sampled last."""
        width = max(self._lengths) + 1
        self._segments = [(first, last, columns + 1) for first, last, columns in self._segments or self._cut()]
        mask = self._columns[:width] <= self._position[:, None]  # (b, columns)
        for cache in self._caches:
            cache.extend(self._position, width)
        with in_segments(self._segments):
            states, hidden = self._forward(self._token[:, None], self._mask(mask), self._position[:, None])
        assert self._states is not None
        self._states[self._columns[: len(self.rows)], self._position] = states[:, 0]
        self._hidden = hidden[:, 0]
        self._position = self._position + 1
        self._lengths = [length + 1 for length in self._lengths]

    def _prefill(self, rows: list[int]) -> None:
        """Run prompts into the next free slots."""
        prompts = [self._prompts[row] for row in rows]
        lengths, first, device = [len(prompt) for prompt in prompts], len(self.rows), self._position.device
        width = max(lengths)
        ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=device)  # (b, P)
        for cache in self._caches:
            cache.fill(first)
        states, hidden = self._forward(ids, None, self._columns[:width].expand(len(rows), -1))
        if self._states is None:
            self._states = states.new_empty(self._slots, self._length, *states.shape[2:])
        self._states[first : first + len(rows), :width] = states
        positions = torch.tensor(lengths, device=device)
        last = hidden[self._columns[: len(rows)], positions - 1]  # (b, H)
        self._hidden = last if self._hidden is None else torch.cat([self._hidden, last])
        self._row = torch.cat([self._row, torch.tensor(rows, device=device)])
        self._position = torch.cat([self._position, positions])
        self._count = torch.cat([self._count, torch.zeros_like(positions)])
        self.rows += rows
        self._lengths += lengths

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor]:
        """States at the cut (b, T, ...) and hidden states behind the final norm (b, T, H)."""
        trunk_cache, top_cache = self._caches
        states: Tensor = self._split.trunk(ids, mask, positions, trunk_cache)
        return states, self._split.top.part(states, mask, positions, top_cache)

    def _mask(self, visible: Tensor) -> Tensor:
        """(b, columns) -> (b, 1, 1, columns), ready for the attention, so that transformers has none to build."""
        visible = visible[:, None, None]
        if not self._eager:
            return visible
        assert self._hidden is not None
        hidden = torch.finfo(self._hidden.dtype).min
        return torch.zeros(visible.shape, dtype=self._hidden.dtype, device=visible.device).masked_fill(~visible, hidden)

    def _response(self, slot: int, finish: Finish) -> Response:
        row = self.rows[slot]
        prompt, tokens = self._prompts[row], self._sampled[row]
        assert self._states is not None
        states = self._states[slot, : len(prompt) + len(tokens) - 1].clone()
        return Response(row, list(prompt), tokens, finish, states, self._logprobs[row, : len(tokens)])

    def _drop(self, ended: Collection[int]) -> None:
        """Take the ended slots' rows out; the last rows move into the gaps."""
        count = len(self.rows) - len(ended)
        gaps = [slot for slot in sorted(ended) if slot < count]
        movers = [slot for slot in range(count, len(self.rows)) if slot not in ended]
        order = list(range(count))
        for gap, mover in zip(gaps, movers, strict=True):
            order[gap] = mover
            length = self._lengths[mover]
            for cache in self._caches:
                cache.move(mover, gap, length)
            assert self._states is not None
            self._states[gap, :length] = self._states[mover, :length]
        self.rows = [self.rows[slot] for slot in order]
        self._lengths = [self._lengths[slot] for slot in order]
        self._segments = []
        self._hidden = self._hidden if order else None  # nothing comes from where no row is left
        index = torch.tensor(order, dtype=torch.long, device=self._position.device)
        self._row, self._position, self._count, self._token = (
            tensor[index] for tensor in (self._row, self._position, self._count, self._token)
        )

    def _cut(self) -> list[Segment]:
        """On a GPU the rows are one segment: there a call costs more than the columns that it would save."""
        if self._position.device.type == "cpu":
            return segments_of(self._lengths)
        return [(0, len(self.rows), max(self._lengths))]


def prefill_groups(lengths: Sequence[int]) -> list[list[int]]:
    """Cut prompts, by falling length, into forwards without much padding: none is shorter than 7/8 of its longest,
    and no forward has more than PREFILL_TOKENS, unless one prompt alone does."""
    groups: list[list[int]] = []
    for place, length in enumerate(lengths):
        longest = lengths[groups[-1][0]] if groups else 0
        if not groups or 8 * length < 7 * longest or (len(groups[-1]) + 1) * longest > PREFILL_TOKENS:
            groups.append([])
        groups[-1].append(place)
    return groups
