"""Where preferences come from: the demo set, a folder, or a data set of the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config
from pipeline.data.demo import demo_preferences
from pipeline.data.hub import hub_errors
from pipeline.data.preferences import SPLITS, Preference, parse_rows, read_jsonl
from pipeline.errors import UserError

Rows = Iterator[tuple[str, Mapping[str, Any]]]


def load_source(
    config: Config, environ: Mapping[str, str] = os.environ, snapshot: Path | None = None
) -> dict[str, list[Preference]]:
    """Return the preferences of `config.data`, {"train": [...], "test": [...]}, cut to the configured limits.

    "hh" stands for the folder that the environment variable HH_DATA names; of a hub data set `snapshot` holds the
    files. UserError for a source that is not there or holds a malformed row.
    """
    data = config.data
    limits = {"train": data.limit_train, "test": data.limit_test}
    if data.source == "demo":
        made = demo_preferences(config.seed, data.demo.train, data.demo.test)
        return {split: made[split][: limits[split]] for split in SPLITS}
    folder = data_folder(data.source, environ)
    loaded = {}
    for split in SPLITS:
        if folder is not None:
            rows, name = read_jsonl(_file(folder, split)), str(folder)
        else:
            assert snapshot is not None
            rows, name = _hub_rows(snapshot, data.source, split, data.subsets), data.source
        loaded[split] = parse_rows(rows, limits[split], f"{name} ({split})")
    return loaded


def data_folder(source: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The folder that `source` stands for, or None for a hub id."""
    if source == "hh":
        if not environ.get("HH_DATA"):
            raise UserError(
                "data.source: hh: HH_DATA is not set; set it to the folder with HH's train.jsonl.gz and test.jsonl.gz, "
                "or use data.source=Anthropic/hh-rlhf"
            )
        source = environ["HH_DATA"]
        if not Path(source).is_dir():
            raise UserError(f"HH_DATA: {source}: no such folder; set it to the folder with HH's files")
        return Path(source)
    if Path(source).is_dir():
        return Path(source)
    looks_local = source.startswith(("/", "./", "../", "~")) or source.count("/") > 1
    if looks_local:
        raise UserError(f"data.source: {source}: no such folder; give 'demo', a folder or a hub data set")
    return None


def _file(folder: Path, split: str) -> Path:
    for name in (f"{split}.jsonl", f"{split}.jsonl.gz"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder}: has no {split}.jsonl or {split}.jsonl.gz; a data folder holds train.jsonl[.gz] and "
        "test.jsonl[.gz], "
        'rows {"chosen", "rejected"} or {"prompt", "chosen", "rejected"}'
    )


def _hub_rows(snapshot: Path, name: str, split: str, subsets: tuple[str, ...]) -> Rows:
    """Rows of a hub data set's split; of several of HH's folders (`data_dir`) evenly mixed."""
    parts = [_load_subset(snapshot, name, split, subset) for subset in subsets or (None,)]
    places = [f"{name}/{subset}" if subset else name for subset in subsets or (None,)]
    rows = [enumerate(part) for part in parts]
    for part in mixed([len(part) for part in parts]):
        number, row = next(rows[part])
        yield f"{places[part]} ({split}) row {number}", row


def mixed(lengths: Sequence[int]) -> list[int]:
    """Which part each row of a whole comes from, so that any beginning holds about each part's share.

    Row i of n has its place at (i + 1/2) / n of the whole. The first test prompts are those that evaluations take:
    they must not all be of one kind.
    """
    return [part for _, part in sorted(((i + 0.5) / n, part) for part, n in enumerate(lengths) for i in range(n))]


def _load_subset(snapshot: Path, name: str, split: str, subset: str | None) -> Any:
    from datasets import load_dataset

    place = f"{name}/{subset}" if subset else name
    with hub_errors(
        f"data.source: {place}: cannot load split {split}", "take a data set with this split, or give a folder"
    ):
        # The files of one commit. By the data set's name, the library would without a network take any of its cache.
        return load_dataset(str(snapshot), data_dir=subset, split=split)
