"""Stop sequences: seen in sampled ids as they appear, and cut from the text that is scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of `ids`, with nothing skipped and nothing tidied."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


class StopSequences:
    """Texts at which a response ends. A sequence may begin and end inside tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sequences: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._sequences = tuple(sequences)
        # A token holds a byte or more, so these many tokens always cover a sequence that the last of them completes.
        self._window = max((len(text.encode("utf-8")) for text in sequences), default=0) + 1
        self._closing = _tokens_with_any(tokenizer, {text[-1] for text in sequences})

    def completed_by(self, response: Sequence[int]) -> bool:
        """Whether the last id of `response` completes a stop sequence, given that no earlier id did."""
        if not response or response[-1] not in self._closing:
            return False
        return self.find(decode_text(self._tokenizer, response[-self._window :])) is not None

    def find(self, text: str) -> int | None:
        """Where the first stop sequence begins in `text`, or None."""
        places = [place for sequence in self._sequences if (place := text.find(sequence)) >= 0]
        return min(places, default=None)


def _tokens_with_any(tokenizer: PreTrainedTokenizerBase, characters: set[str]) -> frozenset[int]:
    """Ids whose text holds one of `characters`, or a part of a character; all others need no look at the text."""
    if not characters:
        return frozenset()
    wanted = characters | {"\N{REPLACEMENT CHARACTER}"}
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    return frozenset(token for token, text in enumerate(texts) if not wanted.isdisjoint(text))
