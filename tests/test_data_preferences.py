"""Rows of preference data: split as trlX splits them, useless ones counted, malformed ones named by file and line."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import resolve
from pipeline.data.preferences import Preference, SkippedRow, parse_row, read_split, split_dialogues, write_jsonl
from pipeline.data.sources import load_source, mixed
from pipeline.errors import UserError
from pipeline.run.directory import Artifact, Outputs, RunDir

ASK = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"


def write_rows(path: Path, *rows: Any) -> None:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def load(source: str, environ: dict[str, str] | None = None, **data: Any) -> dict[str, list[Preference]]:
    return load_source(resolve({"data": {"source": source, **data}}), environ or {})


def test_dialogues_are_split_at_their_last_assistant_turn() -> None:
    pair = split_dialogues(ASK + " Because.\n\nReally. ", ASK + "  No idea\n")
    assert pair == Preference(ASK, " Because.\n\nReally.", " No idea")


def test_an_inline_mention_of_the_assistant_is_no_turn() -> None:
    assert split_dialogues(ASK + " I am an Assistant: yes", ASK + " no").chosen == " I am an Assistant: yes"


def test_dialogues_that_part_earlier_say_nothing_about_one_prompt() -> None:
    with pytest.raises(SkippedRow, match="differ"):
        split_dialogues(ASK + " a\n\nHuman: b\n\nAssistant: c", ASK + " d")


def test_rows_with_a_prompt_are_taken_as_they_are() -> None:
    row = {"prompt": ASK + " ", "chosen": "yes", "rejected": " no ", "other": 1}
    assert parse_row(row) == Preference(ASK, " yes", " no")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"chosen": ASK + " a"}, "has no 'rejected'; its keys are: chosen"),
        ({"chosen": ASK + " a", "rejected": 3}, "has a 'rejected' that is int, not text"),
        ({"chosen": "Hi", "rejected": ASK + " a"}, "has no '\\n\\nAssistant:' turn"),
        ({"prompt": "Why?", "chosen": "a", "rejected": "b"}, "does not end with 'Assistant:'"),
        (
            {"prompt": ASK, "chosen": "a \ud83d", "rejected": "b"},
            "has a 'chosen' with half of a surrogate pair (\\ud83d) at character 2",
        ),
        ("[" * 100_000, "not valid JSON"),
        ("{broken", "not valid JSON"),
        ("[1]", "a JSON list, not an object"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path: Path, row: Any, fault: str) -> None:
    good = {"chosen": ASK + " a", "rejected": ASK + " b"}
    write_rows(tmp_path / "train.jsonl", good, "", row)
    write_rows(tmp_path / "test.jsonl", good)

    with pytest.raises(UserError) as caught:
        load(str(tmp_path))

    assert f"{tmp_path / 'train.jsonl'}:3" in str(caught.value) and fault in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_of_no_use_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = {"chosen": ASK + " a", "rejected": ASK + " b"}
    empty = {"chosen": ASK + " ", "rejected": ASK + " b"}
    same = {"chosen": ASK + " a", "rejected": ASK + " a "}
    write_rows(tmp_path / "train.jsonl.gz", empty, good, same, empty, good, good)
    write_rows(tmp_path / "test.jsonl", good)
    caplog.set_level(logging.INFO)

    loaded = load(str(tmp_path), limit_train=2)

    assert loaded == {"train": [Preference(ASK, " a", " b")] * 2, "test": [Preference(ASK, " a", " b")]}
    assert "skipped 2 rows: an answer is empty" in caplog.text
    assert "skipped 1 rows: both answers are the same" in caplog.text


def test_a_data_set_without_any_pair_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", {"chosen": ASK, "rejected": ASK})
    with pytest.raises(UserError, match=r"no preference pair \(1 rows skipped\)"):
        load(str(tmp_path))


def test_a_folder_without_the_files_is_told_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no train.jsonl or train.jsonl.gz; a data folder holds"):
        load(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        load(str(tmp_path / "missing"))


def test_a_truncated_archive_is_told_from_a_bad_row(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl.gz", *[{"chosen": ASK + f" a{n}", "rejected": ASK + " b"} for n in range(999)])
    whole = (tmp_path / "train.jsonl.gz").read_bytes()
    (tmp_path / "train.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"train\.jsonl\.gz: cannot be read"):
        load(str(tmp_path))


def test_hh_stands_for_the_folder_in_hh_data(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl.gz", {"chosen": ASK + " a", "rejected": ASK + " b"})

    assert load("hh", {"HH_DATA": str(tmp_path)})["test"] == [Preference(ASK, " a", " b")]
    with pytest.raises(UserError, match="HH_DATA is not set"):
        load("hh")
    with pytest.raises(UserError, match="HH_DATA: /nowhere: no such folder"):
        load("hh", {"HH_DATA": "/nowhere"})


def test_a_hub_data_set_goes_through_the_same_parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for subset in ("helpful-base", "harmless-base", "red-team"):
        for split in ("train", "test"):
            write_rows(
                tmp_path / "rows" / subset / f"{split}.jsonl.gz", {"chosen": f"{ASK} {subset}", "rejected": ASK + " b"}
            )
    data = {"source": "Anthropic/hh-rlhf", "subsets": ["helpful-base", "harmless-base"]}
    loaded = load_source(resolve({"data": data}), {}, tmp_path / "rows")
    assert [pair.chosen for pair in loaded["train"]] == [" helpful-base", " harmless-base"]
    assert len(loaded["test"]) == 2


def test_any_beginning_of_several_folders_holds_each_ones_share() -> None:
    assert mixed([2, 4]) == [1, 0, 1, 1, 0, 1]
    order = mixed([300, 100, 20])
    assert [order.count(part) for part in range(3)] == [300, 100, 20]
    for length in (21, 42, 210):
        shares = [order[:length].count(part) * 420 / length for part in range(3)]
        assert shares == pytest.approx([300, 100, 20], abs=21)  # at most a row off
    assert mixed([3]) == [0, 0, 0]


def test_a_split_that_a_hub_data_set_does_not_have_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_rows(tmp_path / "rows" / "train.jsonl", {"chosen": ASK + " a", "rejected": ASK + " b"})
    with pytest.raises(UserError, match=r"data\.source: a/b: cannot load split test \(.*\); take a data set") as caught:
        load_source(resolve({"data": {"source": "a/b"}}), {}, tmp_path / "rows")
    assert "\n" not in str(caught.value)


def test_what_prefetch_wrote_is_read_back_strictly(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    pairs = [Preference(ASK, " ä\n\nb", " c"), Preference(ASK, " d", " e")]
    write_jsonl(tmp_path / "data" / "train.jsonl", pairs)
    run.write_outputs(Outputs("prefetch", "f", 1, {"data": Artifact("data", "0", 0)}))

    assert read_split(run, "train") == pairs

    with (tmp_path / "data" / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": ASK, "chosen": " ", "rejected": "b"}) + "\n")
    with pytest.raises(UserError, match=r"train.jsonl:3: the row is of no use \(an answer is empty\)"):
        read_split(run, "train")
    with pytest.raises(UserError, match=r"test\.jsonl: no such file"):
        read_split(run, "test")


HH = Path(__file__).parents[2] / "shared" / "data" / "hh"


@pytest.mark.skipif(not (HH / "train.jsonl.gz").is_file(), reason="the real HH rows are not on this machine")
def test_real_hh_rows_are_read(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    loaded = load("hh", {"HH_DATA": str(HH)})

    # Counted by hand: of 2,000 rows four differ before their last turn, and four have an empty chosen answer.
    assert len(loaded["train"]) + len(loaded["test"]) == 1992
    for pair in loaded["train"] + loaded["test"]:
        assert pair.prompt.startswith("\n\nHuman: ") and pair.prompt.endswith("\n\nAssistant:")
        assert pair.chosen[0] == pair.rejected[0] == " " and pair.chosen == pair.chosen.rstrip()
