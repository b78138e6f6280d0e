"""From text to token ids, the same way everywhere: training, rollouts and rewards.

Ids of a prompt and of its response are always made apart and then joined, because a policy samples a response
behind a fixed prompt: text encoded in one piece could merge tokens across the border, which sampling never does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder, from local files only.

    UserError when the folder is missing or holds no tokenizer.
    """
    from transformers import AutoTokenizer

    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the folder of a model with its tokenizer")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: holds no tokenizer that can be loaded ({reason}); save one there, or set model.tokenizer_path"
        ) from error


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text` and of nothing else: no BOS, no EOS.

    A special token's spelling inside the text ("<|endoftext|>") is encoded as ordinary characters, so that no
    text, a user's or a model's, can end a sequence or start a turn.
    """
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])


def encode_all(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each text, by the tokenizer's own threads."""
    if not texts:
        return []
    options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    return [list(ids) for ids in tokenizer(list(texts), return_attention_mask=False, **options)["input_ids"]]


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a response; UserError when the tokenizer defines none."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no EOS token; set eos_token in its tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills batches: the tokenizer's own, else EOS. Nothing reads it: lengths are always explicit."""
    return end_id(tokenizer) if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, max_length: int, end_cut: bool = True
) -> tuple[list[int], list[int]]:
    """Ids of prompt and response, encoded apart; the response ends with EOS.

    Together they are at most `max_length` ids: the prompt loses its beginning, as it does when sampling. A
    response that is too long by itself is cut at its end, and keeps the EOS; the prompt is then empty. Without
    `end_cut` one that is cut has no EOS: its author did not end there.
    """
    return join_pair(encode(tokenizer, prompt), encode(tokenizer, response), end_id(tokenizer), max_length, end_cut)


def join_pair(
    prompt_ids: Sequence[int], response_ids: Sequence[int], end: int, max_length: int, end_cut: bool = True
) -> tuple[list[int], list[int]]:
    """`encode_pair` of texts that are encoded already."""
    ended = [*response_ids[: max_length - 1], end] if end_cut else [*response_ids, end][:max_length]
    room = max_length - len(ended)
    return list(prompt_ids[max(0, len(prompt_ids) - room) :]), ended


def same_vocabulary(a: Path, b: Path) -> bool:
    """Whether the tokenizers of two model folders give the same ids to every text.

    Compares what decides ids: normaliser, pre-tokeniser, model and added tokens, not how the files are written.
    Slow tokenizers, which have no such description, are never the same.
    """
    first, second = _description(a), _description(b)
    return first is not None and first == second


def _description(folder: Path) -> dict[str, Any] | None:
    """The parts of a tokenizer.json that decide ids, in one spelling."""
    path = folder / "tokenizer.json"
    if path.is_file():
        text = path.read_text("utf-8")
    else:
        backend = getattr(load_tokenizer(folder), "backend_tokenizer", None)
        if backend is None:
            return None
        text = backend.to_str()
    try:
        parts: dict[str, Any] = json.loads(text)
        model = dict(parts["model"])
        if "merges" in model:  # "a b" in old files, ["a", "b"] in new ones
            model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a tokenizer description ({error!r}); save the tokenizer again") from None
    model = {key: value for key, value in model.items() if value not in (None, False, "")}  # old writers omit them
    added = sorted((_added(token) for token in parts.get("added_tokens", [])), key=repr)
    return {
        "model": model,
        "added_tokens": added,
        "normalizer": parts.get("normalizer"),
        "pre_tokenizer": parts.get("pre_tokenizer"),
    }


def _added(token: dict[str, Any]) -> tuple[Any, ...]:
    """What of an added token decides ids."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return (token["id"], token["content"], *(bool(token.get(flag, False)) for flag in flags))
