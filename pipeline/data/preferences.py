"""Preference pairs: one prompt, the answer that people chose and the one that they rejected."""

from __future__ import annotations

import gzip
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.run import atomic
from pipeline.run.directory import RunDir

SPLITS = ("train", "test")
TURN = "\n\nAssistant:"
"""What the assistant's turn begins with, and what every prompt ends with."""

_log = logging.getLogger(__name__)


class SkippedRow(Exception):
    """A well-formed row that says nothing about a preference; the message is the reason, for counting."""


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, which ends with "Assistant:"; answers start with a space and end without one."""

    prompt: str
    chosen: str
    rejected: str


def split_dialogues(chosen: str, rejected: str) -> Preference:
    """Split two whole dialogues at their last assistant turn, as trlX does.

    ValueError for a dialogue without an assistant's turn; SkippedRow when the dialogues differ before their last
    turn (real HH has about two such rows in a thousand: their last turns answer different questions).
    """
    prompts = []
    for dialogue in (chosen, rejected):
        start = dialogue.rfind(TURN)
        if start < 0:
            raise ValueError("has no '\\n\\nAssistant:' turn")
        prompts.append(dialogue[: start + len(TURN)])
    if prompts[0] != prompts[1]:
        raise SkippedRow("dialogues differ before their last turn")
    return _preference(prompts[0], chosen[len(prompts[0]) :], rejected[len(prompts[0]) :])


def parse_row(row: Mapping[str, Any]) -> Preference:
    """Make a preference of a row with whole dialogues (chosen, rejected) or with prompt, chosen and rejected.

    ValueError says what is wrong with a malformed row; SkippedRow why a well-formed one is of no use.
    """
    keys = ("prompt", "chosen", "rejected") if row.get("prompt") is not None else ("chosen", "rejected")
    for key in keys:
        if key not in row:
            raise ValueError(f"has no '{key}'; its keys are: {', '.join(map(str, row)) or 'none'}")
        if not isinstance(row[key], str):
            raise ValueError(f"has a '{key}' that is {type(row[key]).__name__}, not text")  # noqa: TRY004 (bad data)
        check_characters(key, row[key])
    if "prompt" not in keys:
        return split_dialogues(row["chosen"], row["rejected"])
    prompt = row["prompt"].rstrip()
    if not prompt.endswith("Assistant:"):
        raise ValueError("has a 'prompt' that does not end with 'Assistant:'")
    return _preference(prompt, row["chosen"], row["rejected"])


def check_characters(key: str, text: str) -> None:
    """JSON can spell half of a surrogate pair ("\\ud83d"), which is no character: no file or tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"has a '{key}' with half of a surrogate pair ({half}) at character {error.start}") from None


def _preference(prompt: str, chosen: str, rejected: str) -> Preference:
    chosen, rejected = chosen.strip(), rejected.strip()
    if not chosen or not rejected:
        raise SkippedRow("an answer is empty")
    if chosen == rejected:
        raise SkippedRow("both answers are the same")
    return Preference(prompt, f" {chosen}", f" {rejected}")


def parse_rows(rows: Iterable[tuple[str, Mapping[str, Any]]], limit: int | None, name: str) -> list[Preference]:
    """Parse (place, row) pairs until `limit` preferences are there; skipped rows are counted and logged.

    UserError with the place of a malformed row, or when no row is left.
    """
    skipped: Counter[str] = Counter()

    def kept() -> Iterator[Preference]:
        for place, row in rows:
            try:
                yield parse_row(row)
            except SkippedRow as reason:
                skipped[str(reason)] += 1
            except ValueError as fault:
                raise UserError(f"{place}: the row {fault}; correct or remove it") from None

    preferences = list(islice(kept(), limit))
    for reason, count in skipped.items():
        _log.info("%s: skipped %d rows: %s", name, count, reason)
    if not preferences:
        raise UserError(f"{name}: has no preference pair ({sum(skipped.values())} rows skipped); give another data set")
    return preferences


def read_jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield ("path:line", row) of a .jsonl or .jsonl.gz file; blank lines are passed over."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _parse_line(f"{path}:{number}", line)
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
            raise UserError(f"{path}: cannot be read ({error}); copy or download it again") from None


def _parse_line(place: str, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # the latter for thousands of nested brackets
        raise UserError(f"{place}: not valid JSON ({error}); correct or remove the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: a JSON {type(row).__name__}, not an object; correct or remove the line")
    return row


def write_jsonl(path: Path, preferences: Iterable[Preference]) -> None:
    """Write preferences, one JSON object a line, atomically."""
    with atomic.atomic_file(path) as file:
        for preference in preferences:
            file.write(json.dumps(asdict(preference), ensure_ascii=False).encode("utf-8") + b"\n")


def read_split(run: RunDir, split: str) -> list[Preference]:
    """Read a split ("train" or "test") of the run's data, as `prefetch` wrote it.

    Every row must be whole here: UserError names the file and the line of one that is not.
    """
    path = run.artifact("prefetch", "data") / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; run it again with --force --stage prefetch")
    preferences = []
    for place, row in read_jsonl(path):
        try:
            preferences.append(parse_row(row))
        except (ValueError, SkippedRow) as fault:
            reason = fault if isinstance(fault, ValueError) else f"is of no use ({fault})"
            raise UserError(f"{place}: the row {reason}; run it again with --force --stage prefetch") from None
    if not preferences:
        raise UserError(f"{path}: is empty; run it again with --force --stage prefetch")
    return preferences
