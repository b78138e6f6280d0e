"""The SFT stage: fine-tune the base model on the chosen responses.

    [accelerate launch ...] python -m pipeline.training.sft --run RUN --out DIR

Writes DIR/model, a Hugging Face folder with the tokenizer.
"""

from __future__ import annotations

import math
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

from pipeline.config.methods import SFT
from pipeline.data.preferences import Preference, read_split
from pipeline.data.tokens import encode_pair, load_tokenizer, pad_id
from pipeline.run.sources import base_model_path, tokenizer_path
from pipeline.training.batches import pad_rows
from pipeline.training.metrics import Row
from pipeline.training.model_card import Card, write_card, write_generation_config
from pipeline.training.models import check_positions, disable_dropout, load_causal_lm
from pipeline.training.packing import PackedRow, block_mask, pack, positions_and_segments
from pipeline.training.report_once import run_rank
from pipeline.training.sharding import loads_weights
from pipeline.training.supervised import hidden_states, start, train
from pipeline.training.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Dialogue:
    """Ids of prompt and response, with its EOS if it gets one and is not cut; tokens from `first` on carry loss."""

    ids: tuple[int, ...]
    first: int

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def loss_tokens(self) -> int:
        return len(self.ids) - self.first


def make_dialogues(
    preferences: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, settings: SFT
) -> list[Dialogue]:
    """The chosen dialogues as ids. The very first token of a dialogue has nothing to be predicted from.

    A response that is too long by itself is cut, and has no EOS: nothing says that it ends there.
    """
    dialogues = []
    for preference in preferences:
        if settings.append_eos:
            prompt, response = encode_pair(
                tokenizer, preference.prompt, preference.chosen, settings.max_length, end_cut=False
            )
        else:  # the place of the EOS that is taken off again is the text's
            prompt, response = encode_pair(tokenizer, preference.prompt, preference.chosen, settings.max_length + 1)
            response = response[:-1]
        first = 1 if settings.loss_on == "dialogue" else max(1, len(prompt))
        dialogues.append(Dialogue((*prompt, *response), first))
    return [dialogue for dialogue in dialogues if dialogue.loss_tokens > 0]


def collate(dialogues: Sequence[Dialogue], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids (B, T), and for the N tokens that carry loss: flat places of what predicts them, and their ids.

    All int64. The places index a (B * T, H) view of the hidden states.
    """
    return _collate([[dialogue] for dialogue in dialogues], pad)


def collate_packed(rows: Sequence[PackedRow[Dialogue]], pad: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `collate`, of rows that hold several dialogues; also their positions and segments (B, T), int64."""
    ids, places, targets = _collate([row.examples for row in rows], pad)
    lengths = [[dialogue.length for dialogue in row.examples] for row in rows]
    return ids, places, targets, *positions_and_segments(lengths)


def _collate(rows: Sequence[Sequence[Dialogue]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = pad_rows([[token for dialogue in row for token in dialogue.ids] for row in rows], pad)  # (B, T)
    places: list[int] = []
    targets: list[int] = []
    for at, row in enumerate(rows):
        start = at * ids.shape[1]
        for dialogue in row:
            places += range(start + dialogue.first - 1, start + dialogue.length - 1)
            targets += dialogue.ids[dialogue.first :]
            start += dialogue.length
    return ids, torch.tensor(places), torch.tensor(targets)  # (B, T), (N,), (N,)


class ResponseLoss(nn.Module):
    """Sum of the cross-entropies (nats) of the tokens that carry loss; only their positions meet the vocabulary."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        ids: Tensor,  # (B, T)
        places: Tensor,  # (N,)
        targets: Tensor,  # (N,)
        positions: Tensor | None = None,  # (B, T), where rows hold several dialogues
        segments: Tensor | None = None,  # (B, T)
    ) -> tuple[Tensor, Tensor]:  # (), (1,)
        """The sum, and the same detached as float64."""
        mask = None if segments is None else block_mask(segments, self.model.dtype)
        hidden = hidden_states(self.model, ids, places, positions, mask)  # (N, H)
        logits = self.model.get_output_embeddings()(hidden)  # (N, V)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        return loss, loss.detach().double().reshape(1)


def make_task(settings: SFT, pad: int) -> Task[Dialogue]:
    """Dialogues, or rows of several, as the loop trains them."""
    width = min(settings.max_length, settings.micro_batch_tokens)
    if not settings.packing:
        return Task(lambda batch: collate(batch, pad), lambda dialogue: dialogue.loss_tokens)
    return Task(
        lambda rows: collate_packed(rows, pad),
        lambda dialogue: dialogue.loss_tokens,
        rows=lambda dialogues: pack(dialogues, width),
    )


def main(argv: list[str] | None = None) -> int:
    """Run the stage's work; returns the exit status."""
    session = start("sft", __doc__ or "", argv)
    run, config, settings = session.run, session.config, session.config.sft
    base = base_model_path(run, config)
    tokenizer = load_tokenizer(tokenizer_path(run, config, base))
    check_positions(base, "sft.max_length", settings.max_length)
    examples = make_dialogues(read_split(run, "train"), tokenizer, settings)
    heldout = make_dialogues(read_split(run, "test"), tokenizer, settings)
    model = load_causal_lm(base, torch.float32, weights=loads_weights(session.accelerator))
    disable_dropout(model)
    tokens = sum(dialogue.loss_tokens for dialogue in heldout)

    def summarise(sums: list[float]) -> dict[str, float]:
        return {"loss": sums[0] / tokens, "perplexity": math.exp(min(sums[0] / tokens, 50.0))}

    def describe(folder: Path, figures: dict[str, Any], rows: list[Row]) -> None:
        write_generation_config(folder, tokenizer, session.config)
        write_card(folder, session.run, session.config, Card("SFT", ("sft",), figures, rows=rows))

    return train(
        session,
        base,
        ResponseLoss(model),
        model,
        tokenizer,
        make_task(settings, pad_id(tokenizer)),
        examples,
        heldout,
        summarise,
        shuffled=settings.shuffle,
        counts={"test_tokens": tokens},
        describe=describe,
    )


if __name__ == "__main__":
    run_rank(main)
