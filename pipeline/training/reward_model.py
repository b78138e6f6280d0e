"""The reward model stage: a score head on the SFT or base model, trained to rank the chosen answer above the rejected.

    [accelerate launch ...] python -m pipeline.training.reward_model --run RUN --out DIR

The loss of a pair is -log sigmoid(r(chosen) - r(rejected)) (Bradley-Terry; Ouyang et al. 2022, eq. 1), and the
reward is read at a row's explicit last token, its EOS. Writes DIR/model, a one-label sequence classification folder
with the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.procs import die_with_parent

if __name__ == "__main__":
    die_with_parent()  # before the imports below, which take seconds

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.preferences import Preference, read_split
from pipeline.data.tokens import encode_pair, load_tokenizer, pad_id
from pipeline.run.sources import base_model_path, tokenizer_path
from pipeline.training.batches import pad_rows
from pipeline.training.models import check_positions, disable_dropout, load_reward_model
from pipeline.training.report_once import run_rank
from pipeline.training.supervised import start, train
from pipeline.training.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    """Preferences as ids. Prompt and longer answer together are at most `max_length` ids."""
    pairs = []
    for preference in preferences:
        one, chosen = encode_pair(tokenizer, preference.prompt, preference.chosen, max_length)
        other, rejected = encode_pair(tokenizer, preference.prompt, preference.rejected, max_length)
        pairs.append(Pair(tuple(one if len(one) < len(other) else other), tuple(chosen), tuple(rejected)))
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


def answer_mask(segments: Tensor) -> Tensor:
    """Additive attention mask: a token sees what lies before it in the prompt and in its own answer.

    (B, T) int64 -> (B, 1, T, T) float32, 0 where allowed and the least float32 elsewhere. No row is empty: a token
    sees itself.
    """
    width = segments.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    keys, queries = segments[:, None, :], segments[:, :, None]
    allowed = causal & ((keys == 0) | (keys == queries))  # (B, T, T)
    mask = torch.zeros(allowed.shape, device=segments.device)
    return mask.masked_fill(~allowed, torch.finfo(torch.float32).min).unsqueeze(1)


def scores(model: PreTrainedModel, ids: Tensor, positions: Tensor, segments: Tensor, ends: Tensor) -> Tensor:
    """Rewards of both answers, float32: the score head at their last tokens. # 3 x (B, T), (B, 2) -> (B, 2)"""
    output = model.base_model(
        input_ids=ids, position_ids=positions, attention_mask=answer_mask(segments), use_cache=False
    )
    rows = torch.arange(len(ids), device=ids.device).unsqueeze(1) * ids.shape[1]  # (B, 1)
    hidden = output.last_hidden_state.flatten(0, 1).index_select(0, (rows + ends).flatten())  # (2B, H)
    return model.score(hidden).float().view(-1, 2)  # type: ignore[no-any-return]


class PairLoss(nn.Module):
    """Sum over pairs of -log sigmoid(chosen - rejected)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, segments: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        chosen, rejected = scores(self.model, ids, positions, segments, ends).unbind(1)  # (B,), (B,)
        loss = -F.logsigmoid(chosen - rejected).sum()
        return loss, pair_sums(chosen.detach(), rejected.detach())


STATISTICS = ("losses/loss", "accuracy", "margin", "chosen_mean", "rejected_mean")


def pair_sums(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Sums over pairs, float64: loss, right, margin, chosen, rejected. A tie is half right. # (B,), (B,) -> (5,)"""
    chosen, rejected = chosen.double(), rejected.double()
    margin = chosen - rejected
    right = (margin > 0).double() + 0.5 * (margin == 0).double()
    return torch.stack([-F.logsigmoid(margin), right, margin, chosen, rejected]).sum(dim=1)


def main(argv: list[str] | None = None) -> int:
    """Run the stage's work; returns the exit status."""
    session = start("reward-model", "reward_model", __doc__ or "", argv)
    run, config, settings = session.run, session.config, session.config.reward_model
    if settings.base == "sft":
        base = run.artifact("sft", "model")
        tokenizer = load_tokenizer(base)
    else:
        base = base_model_path(run, config)
        tokenizer = load_tokenizer(tokenizer_path(run, config, base))
    check_positions(base, "reward_model.max_length", settings.max_length)
    examples = make_pairs(read_split(run, "train"), tokenizer, settings.max_length)
    heldout = make_pairs(read_split(run, "test"), tokenizer, settings.max_length)
    model = load_reward_model(base, torch.float32, new_head=True)
    disable_dropout(model)
    pad = pad_id(tokenizer)
    model.config.pad_token_id = pad  # Hugging Face's own pooling needs it for batches
    task: Task[Pair] = Task(lambda batch: collate(batch, pad), lambda _: 1, STATISTICS)

    def summarise(sums: list[float]) -> dict[str, float]:
        names = ("loss", *STATISTICS[1:])
        return {name: value / len(heldout) for name, value in zip(names, sums, strict=True)}

    return train(
        session,
        base,
        PairLoss(model),
        model,
        tokenizer,
        task,
        examples,
        heldout,
        summarise,
        counts={"pairs": len(heldout)},
    )


if __name__ == "__main__":
    run_rank(main)
