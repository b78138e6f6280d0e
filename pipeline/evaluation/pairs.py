"""Preference pairs to judge a reward model by: HH's rows, or RewardBench's with their subsets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.preferences import TURN, Preference, check_characters, parse_rows, read_jsonl
from pipeline.errors import UserError

CATEGORIES: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,  # its 447 rows weigh as much as all the programming ones
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
"""RewardBench's categories: the subsets of each, with their weights in its average."""

_Rows = Iterator[tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Pair:
    """A preference, and the subset that it belongs to, if any."""

    prompt: str
    chosen: str
    rejected: str
    subset: str = ""


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a .jsonl, .jsonl.gz or .parquet file, or of a folder's test split or RewardBench's files.

    Rows with a "subset" are RewardBench's. UserError with the place of a malformed row, or when there are none.
    """
    rows = [row for file in _files(path) for row in _rows(file)]
    if rows and "subset" in rows[0][1]:
        return [_rewardbench(place, row) for place, row in rows]
    return [of_preference(preference) for preference in parse_rows(iter(rows), None, str(path))]


def of_preference(preference: Preference) -> Pair:
    """A pair of no subset."""
    return Pair(preference.prompt, preference.chosen, preference.rejected)


def category_scores(accuracy: Mapping[str, float]) -> dict[str, float]:
    """RewardBench's score of each category that has a subset here: its subsets' accuracies, averaged by weight."""
    scores = {}
    for category, weights in CATEGORIES.items():
        here = {subset: weight for subset, weight in weights.items() if subset in accuracy}
        if here:
            total = sum(weight * accuracy[subset] for subset, weight in here.items())
            scores[category] = total / sum(here.values())
    return scores


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for pattern in ("test.jsonl", "test.jsonl.gz", "filtered*.parquet", "test*.parquet"):
        if found := sorted(path.glob(pattern)):
            return found
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give preference pairs as .jsonl, .jsonl.gz or .parquet")
    raise UserError(f"{path}: has no test.jsonl, test.jsonl.gz, filtered*.parquet or test*.parquet; name the file")


def _rows(path: Path) -> _Rows:
    if path.suffix != ".parquet":
        yield from read_jsonl(path)
        return
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}); download it again") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}:{number}", row


def _rewardbench(place: str, row: Mapping[str, Any]) -> Pair:
    """A row of RewardBench. Its prompts are what a user said: they become one turn of a dialogue as in HH."""
    for key in ("prompt", "chosen", "rejected", "subset"):
        if not isinstance(row.get(key), str):
            raise UserError(
                f"{place}: the row has {'no' if row.get(key) is None else 'a'} '{key}'"
                f"{'' if row.get(key) is None else ' that is not text'}; correct or remove it"
            )
        try:
            check_characters(key, row[key])
        except ValueError as fault:
            raise UserError(f"{place}: the row {fault}; correct or remove it") from None
    prompt = row["prompt"].rstrip()
    if not prompt.endswith(TURN.strip()):
        prompt = f"\n\nHuman: {prompt.lstrip()}{TURN}"
    return Pair(prompt, f" {row['chosen'].strip()}", f" {row['rejected'].strip()}", row["subset"])
