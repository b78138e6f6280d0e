"""The reward model stage: a score head on the SFT or base model, trained to rank the chosen answer above the rejected.

    [accelerate launch ...] python -m pipeline.training.reward_model --run RUN --out DIR

The loss of a pair is -log sigmoid(r(chosen) - r(rejected)) (Bradley-Terry; Ouyang et al. 2022, eq. 1), and the
reward is read at a row's explicit last token, its EOS. Writes DIR/model, a one-label sequence classification folder
with the tokenizer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import heavy

if __name__ == "__main__":
    heavy.begin()  # before the imports below, which take seconds

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.preferences import Preference, read_split
from pipeline.data.tokens import encode, end_id, load_tokenizer, pad_id
from pipeline.errors import UserError
from pipeline.evaluation.reward_model import BINS, expected_calibration_error
from pipeline.run.sources import base_model_path, supervised_model, tokenizer_path
from pipeline.training.batches import pad_rows
from pipeline.training.metrics import Row
from pipeline.training.model_card import Card, write_card
from pipeline.training.models import check_positions, disable_dropout, load_reward_model
from pipeline.training.packing import additive
from pipeline.training.report_once import run_rank
from pipeline.training.sharding import loads_weights
from pipeline.training.supervised import hidden_states, start, train
from pipeline.training.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """Ids of a prompt and of its two answers, each with its EOS."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


def make_pairs(preferences: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Pair]:
    """Preferences as ids. Prompt and longer answer are at most `max_length` ids: the prompt loses its beginning.

    Dropped are pairs of which an answer would be cut, or no token of the prompt be left: their rewards would be those
    of other texts. UserError when none is left.
    """
    end, pairs = end_id(tokenizer), []
    for preference in preferences:
        prompt = encode(tokenizer, preference.prompt)
        chosen, rejected = ((*encode(tokenizer, text), end) for text in (preference.chosen, preference.rejected))
        room = max_length - max(len(chosen), len(rejected))
        if prompt and room > 0:
            pairs.append(Pair(tuple(prompt[-room:]), chosen, rejected))
    if preferences and not pairs:
        raise UserError(f"reward_model.max_length: no pair of the data fits into {max_length} tokens; raise it")
    if dropped := len(preferences) - len(pairs):
        _log.warning("%d of %d pairs dropped: longer than %d tokens", dropped, len(preferences), max_length)
    return pairs


def collate(pairs: Sequence[Pair], pad: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A pair as one right-padded row, prompt + chosen + rejected: the prompt, most of HH's text, is computed once.

    Returns ids, positions and segments (B, T), and the places of the two last tokens (B, 2); all int64. The rejected
    answer's positions go on from the prompt's, as if the chosen one were not there. Segments: 0 prompt, 1 chosen,
    2 rejected, 3 padding.
    """
    ids = pad_rows([(*pair.prompt, *pair.chosen, *pair.rejected) for pair in pairs], pad)
    positions = pad_rows([_positions(pair) for pair in pairs], 0)
    segments = pad_rows([_segments(pair) for pair in pairs], 3)
    ends = [(len(pair.prompt) + len(pair.chosen) - 1, pair.length - 1) for pair in pairs]
    return ids, positions, segments, torch.tensor(ends)


def _positions(pair: Pair) -> list[int]:
    first = len(pair.prompt)
    return [*range(first + len(pair.chosen)), *range(first, first + len(pair.rejected))]


def _segments(pair: Pair) -> list[int]:
    return [0] * len(pair.prompt) + [1] * len(pair.chosen) + [2] * len(pair.rejected)


def answer_mask(segments: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Additive attention mask: a token sees what lies before it in the prompt and in its own answer.

    (B, T) int64 -> (B, 1, T, T), 0 where allowed and the least number elsewhere. No row is empty: a token sees itself.
    """
    keys, queries = segments[:, None, :], segments[:, :, None]
    return additive((keys == 0) | (keys == queries), dtype)


def scores(model: PreTrainedModel, ids: Tensor, positions: Tensor, segments: Tensor, ends: Tensor) -> Tensor:
    """Rewards of both answers, float32: the score head at their last tokens. # 3 x (B, T), (B, 2) -> (B, 2)"""
    rows = torch.arange(len(ids), device=ids.device).unsqueeze(1) * ids.shape[1]  # (B, 1)
    mask = answer_mask(segments, model.dtype)
    hidden = hidden_states(model, ids, (rows + ends).flatten(), positions, mask)  # (2B, H)
    return model.score(hidden).float().view(-1, 2)  # type: ignore[no-any-return]


STATISTICS = ("losses/loss", "losses/pair_loss", "accuracy", "margin", "chosen_mean", "rejected_mean")
"""What `PairLoss` sums, in this order, before the bins of the calibration."""


class PairLoss(nn.Module):
    """Sum over pairs of -log sigmoid(chosen - rejected) + center * (chosen + rejected)^2.

    The second term keeps rewards near 0, which the first leaves open (Eisenstein et al. 2023, arXiv:2312.09244).
    """

    def __init__(self, model: PreTrainedModel, center: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.center = center

    def forward(self, ids: Tensor, positions: Tensor, segments: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """The sum (), and with it as float64 those of STATISTICS and of `calibration_sums`. # (6 + BINS,)"""
        chosen, rejected = scores(self.model, ids, positions, segments, ends).unbind(1)  # (B,), (B,)
        loss = -F.logsigmoid(chosen - rejected).sum()
        if self.center:
            loss = loss + self.center * (chosen + rejected).square().sum()
        chosen, rejected = chosen.detach().double(), rejected.detach().double()
        sums = [loss.detach().double().reshape(1), pair_sums(chosen, rejected), calibration_sums(chosen - rejected)]
        return loss, torch.cat(sums)


def pair_sums(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Sums over pairs: logistic loss, right, margin, chosen, rejected. A tie is half right. # 2 x (B,) -> (5,)"""
    margin = chosen - rejected
    return torch.stack([-F.logsigmoid(margin), _right(margin), margin, chosen, rejected]).sum(dim=1)


def calibration_sums(margin: Tensor) -> Tensor:
    """Per bin of confidence sigmoid(|margin|), the sum of (right - confidence). # (B,) -> (BINS,)

    Over all pairs these give the expected calibration error: the sum of their absolute values over the number of pairs
    (`pipeline.evaluation.reward_model.expected_calibration_error`).
    """
    confidence = torch.sigmoid(margin.abs())
    place = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)  # (B,)
    gap = _right(margin) - confidence
    return (F.one_hot(place, BINS) * gap[:, None]).sum(dim=0)


def _right(margin: Tensor) -> Tensor:
    return (margin > 0).to(margin.dtype) + 0.5 * (margin == 0).to(margin.dtype)


def main(argv: list[str] | None = None) -> int:
    """Run the stage's work; returns the exit status."""
    session = start("reward-model", __doc__ or "", argv)
    run, config, settings = session.run, session.config, session.config.reward_model
    if settings.base == "sft":
        base = supervised_model(run, "sft")
        tokenizer = load_tokenizer(base)
    else:
        base = base_model_path(run, config)
        tokenizer = load_tokenizer(tokenizer_path(run, config, base))
    check_positions(base, "reward_model.max_length", settings.max_length)
    examples = make_pairs(read_split(run, "train"), tokenizer, settings.max_length)
    heldout = make_pairs(read_split(run, "test"), tokenizer, settings.max_length)
    weights = loads_weights(session.accelerator)
    model = load_reward_model(base, torch.float32, new_head=True, weights=weights)
    disable_dropout(model)
    pad = pad_id(tokenizer)
    model.config.pad_token_id = pad  # Hugging Face's own pooling needs it for batches
    task: Task[Pair] = Task(lambda batch: collate(batch, pad), lambda _: 1, STATISTICS)

    def summarise(sums: list[float]) -> dict[str, float]:
        names = ("loss", *STATISTICS[2:])  # the pairs' loss, without what centres
        figures = {name: value / len(heldout) for name, value in zip(names, sums[1:], strict=False)}
        return {**figures, "calibration_error": expected_calibration_error(sums[len(STATISTICS) :], len(heldout))}

    def describe(folder: Path, figures: dict[str, Any], rows: list[Row]) -> None:
        origin = "its supervised fine-tuning on the same data" if settings.base == "sft" else None
        card = Card("Reward model", ("reward_model",), figures, origin, task="text-classification", rows=rows)
        write_card(folder, session.run, session.config, card)

    return train(
        session,
        base,
        PairLoss(model, settings.center),
        model,
        tokenizer,
        task,
        examples,
        heldout,
        summarise,
        counts={"pairs": len(heldout)},
        describe=describe,
    )


if __name__ == "__main__":
    run_rank(main)
