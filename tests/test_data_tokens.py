"""Ids are made one way: nothing is added, nothing written in a text becomes special, prompts lose their beginning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.data.tokens import encode, encode_pair, end_id, load_tokenizer, pad_id, same_vocabulary
from pipeline.errors import UserError

END = "<|endoftext|>"


def make_tokenizer(folder: Path, eos: str | None = END, pad: str | None = "<|padding|>") -> Path:
    """Train a byte-level BPE with an EOS that a text may spell, and save it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END, "<|padding|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["\n\nHuman: hello there\n\nAssistant: hi friend"] * 10, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=pad).save_pretrained(folder)
    return folder


@pytest.fixture()
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(make_tokenizer(tmp_path / "model"))


def test_a_special_token_spelled_in_a_text_is_ordinary_characters(tokenizer: PreTrainedTokenizerBase) -> None:
    text = f"before{END}after <|padding|>"

    ids = encode(tokenizer, text)

    assert end_id(tokenizer) == 0 and pad_id(tokenizer) == 1
    assert not {0, 1} & set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer(text)["input_ids"].count(0) == 1  # what the tokenizer does when nobody prevents it


def test_encoding_adds_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    assert encode(tokenizer, "") == []
    assert tokenizer.decode(encode(tokenizer, " hi friend")) == " hi friend"


def test_prompt_and_response_are_encoded_apart_and_the_response_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, response = encode_pair(tokenizer, "hello the", "re", 100)

    assert prompt == encode(tokenizer, "hello the")
    assert response == [*encode(tokenizer, "re"), 0]
    assert prompt + response[:-1] != encode(tokenizer, "hello there")  # one piece would merge across the border


def test_a_long_prompt_loses_its_beginning(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = encode(tokenizer, "abcdefgh")
    assert encode_pair(tokenizer, "abcdefgh", "xy", 6) == (whole[-3:], [*encode(tokenizer, "xy"), 0])


def test_a_response_too_long_by_itself_is_cut_and_still_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, response = encode_pair(tokenizer, "abc", "stuvwxyz", 4)
    assert prompt == []
    assert response == [*encode(tokenizer, "stuvwxyz")[:3], 0]


@pytest.mark.parametrize("room", [-1, 0, 1], ids=["cut", "without its end", "whole"])
def test_a_cut_response_may_go_without_an_end(tokenizer: PreTrainedTokenizerBase, room: int) -> None:
    ids = encode(tokenizer, "stuvwxyz")
    prompt, response = encode_pair(tokenizer, "abc", "stuvwxyz", len(ids) + room, end_cut=False)
    assert prompt == []
    assert response == {-1: ids[:-1], 0: ids, 1: [*ids, 0]}[room]


def test_a_tokenizer_without_pad_pads_with_its_end(tmp_path: Path) -> None:
    assert pad_id(load_tokenizer(make_tokenizer(tmp_path / "model", pad=None))) == 0


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no EOS token"):
        end_id(load_tokenizer(make_tokenizer(tmp_path / "model", eos=None)))


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(UserError) as caught:
            load_tokenizer(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_the_same_vocabulary_is_recognised_however_it_is_written(tmp_path: Path) -> None:
    one, two = make_tokenizer(tmp_path / "one"), make_tokenizer(tmp_path / "two")
    description = json.loads((two / "tokenizer.json").read_text())
    description["model"]["merges"] = [" ".join(merge) for merge in description["model"]["merges"]]
    description["truncation"] = None
    (two / "tokenizer.json").write_text(json.dumps(dict(reversed(description.items())), indent=7))
    assert same_vocabulary(one, two)

    description["model"]["vocab"]["h"], description["model"]["vocab"]["e"] = 73, 72
    (two / "tokenizer.json").write_text(json.dumps(description))
    assert not same_vocabulary(one, two)
