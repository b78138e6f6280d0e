"""The prefetch stage: fetch or make everything that later stages read, since compute nodes have no internet.

    python -m pipeline.data.prefetch --run RUN --out DIR

Writes DIR/data/{train,test}.jsonl, and DIR/model when the model is made on the spot. What comes from the hub goes to
the hub's own cache; the values hold its commits and files. The commits that an earlier attempt took are taken again,
so that a branch that moved on changes nothing, unless the stage was forced.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config
from pipeline.data.preferences import SPLITS, Preference, write_jsonl
from pipeline.data.snapshots import fetch_data, fetch_model
from pipeline.data.sources import data_folder, load_source
from pipeline.errors import run_command
from pipeline.run.directory import RunDir
from pipeline.run.sources import EMBEDDED, Pin, models_of, pinned
from pipeline.run.work import forced, parse_work, write_result
from pipeline.serving import sandbox

_log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Run the stage's work."""
    run, config, out = parse_work(__doc__ or "", argv)
    earlier = None if forced() else run
    taken = take_data(config, earlier)
    splits = load_source(config, snapshot=Path(taken["data"].folder) if taken else None)
    for split in SPLITS:
        write_jsonl(out / "data" / f"{split}.jsonl", splits[split])
    artifacts = {"data": "data"}
    values: dict[str, Any] = {f"{split}_rows": len(splits[split]) for split in SPLITS}
    _log.info("%s: %d training and %d test pairs", config.data.source, values["train_rows"], values["test_rows"])
    if config.model.path == EMBEDDED:
        from pipeline.data.embedded import build_model

        values["parameters"] = build_model(config, _texts(splits["train"]), out / "model")
        artifacts["model"] = "model"
    if "sandbox" in config.all:
        before = earlier.values("prefetch").get("sandbox") if earlier is not None else None
        log, built = out / "image.log", run.values("sandbox")
        values["sandbox"] = sandbox.fetch(config, log, _say, forced(), before, built)
    taken |= take_models(config, earlier)
    values["hub"] = {key: asdict(pin) for key, pin in taken.items()}
    write_result(out, artifacts, values)


def take_data(config: Config, earlier: RunDir | None) -> dict[str, Pin]:
    """Fetch the data set, if it is one of the hub's: {"data": ...} or {}. `earlier` is the run whose pins are kept."""
    if config.data.source == "demo" or data_folder(config.data.source) is not None:
        return {}
    name, revision = config.data.source, config.data.revision
    pin = fetch_data(name, revision, _commit(earlier, "data", name, revision), config.data.subsets)
    _log.info("data: %s at commit %s", name, pin.commit)
    return {"data": pin}


def take_models(config: Config, earlier: RunDir | None) -> dict[str, Pin]:
    """Fetch the configuration's models that are the hub's; folders stay where they are."""
    taken = {}
    for key, (name, revision) in models_of(config).items():
        if not Path(name).is_dir():
            taken[key] = fetch_model(key, name, revision, _commit(earlier, key, name, revision))
            _log.info("%s: %s at commit %s", key, name, taken[key].commit)
    return taken


def _say(text: str) -> None:
    _log.info("%s", text)


def _commit(earlier: RunDir | None, key: str, name: str, revision: str | None) -> str | None:
    """The commit that an earlier attempt took of the same, or None."""
    pin = pinned(earlier, key, name, revision) if earlier is not None else None
    return pin.commit if pin is not None else None


def _texts(preferences: list[Preference]) -> list[str]:
    """What the embedded tokenizer is trained on."""
    return [p.prompt + answer for p in preferences for answer in (p.chosen, p.rejected)]


if __name__ == "__main__":
    run_command(main)
