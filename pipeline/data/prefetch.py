"""The prefetch stage: fetch or make everything that later stages read, since compute nodes have no internet.

    python -m pipeline.data.prefetch --run RUN --out DIR

Writes DIR/data/{train,test}.jsonl, and DIR/model when the model is made on the spot. Models of the hub go to the
hub's own cache; their snapshots' paths are recorded in the values.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config
from pipeline.data.hub import hub_errors
from pipeline.data.preferences import SPLITS, Preference, write_jsonl
from pipeline.data.sources import load_source
from pipeline.errors import run_command
from pipeline.run.sources import EMBEDDED
from pipeline.run.work import forced, parse_work, write_result
from pipeline.serving import sandbox

_log = logging.getLogger(__name__)

WEIGHTS_UNUSED = ("*.msgpack", "*.h5", "*.onnx", "*.ot", "*.tflite", "*.gguf", "original/*")
"""Other frameworks' copies of the weights, which nothing here reads."""

_SETTINGS = {"model": "model.path", "reward_model": "reward_model.checkpoint", "tokenizer": "model.tokenizer_path"}


def main(argv: list[str] | None = None) -> None:
    """Run the stage's work."""
    _, config, out = parse_work(__doc__ or "", argv)
    splits = load_source(config)
    for split in SPLITS:
        write_jsonl(out / "data" / f"{split}.jsonl", splits[split])
    artifacts = {"data": "data"}
    values: dict[str, Any] = {f"{split}_rows": len(splits[split]) for split in SPLITS}
    _log.info("%s: %d training and %d test pairs", config.data.source, values["train_rows"], values["test_rows"])
    if config.model.path == EMBEDDED:
        from pipeline.data.embedded import build_model

        values["parameters"] = build_model(config, _texts(splits["train"]), out / "model")
        artifacts["model"] = "model"
    values["snapshots"] = fetch_models(config)
    if "sandbox" in config.all:
        values["sandbox"] = sandbox.fetch(config, out / "image.log", lambda text: _log.info("%s", text), forced())
    write_result(out, artifacts, values)


def fetch_models(config: Config) -> dict[str, str]:
    """Make the configuration's models present on this machine; return the paths of those that the hub gave.

    Keys: "model" and "reward_model" (and "tokenizer" where it is another's); folders stay where they are.
    """
    wanted = {"model": (config.model.path, config.model.revision)}
    if config.reward_model.checkpoint is not None:
        wanted["reward_model"] = (config.reward_model.checkpoint, config.reward_model.revision)
    if config.model.tokenizer_path is not None:
        wanted["tokenizer"] = (config.model.tokenizer_path, None)
    snapshots = {}
    for key, (name, revision) in wanted.items():
        if name == EMBEDDED or Path(name).is_dir():
            continue
        snapshots[key] = _snapshot(key, name, revision)
        _log.info("%s: %s at %s", key, name, snapshots[key])
    return snapshots


def _snapshot(key: str, name: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    with hub_errors(
        f"{_SETTINGS[key]}: {name}: neither a folder nor to be had from the hub",
        "run --stage prefetch where the hub can be reached, correct the name, or give a folder",
    ):
        # Pickled weights are left out where safetensors are there; which of the two, the listing tells.
        return str(snapshot_download(name, revision=revision, ignore_patterns=_ignored(name, revision)))


def _ignored(name: str, revision: str | None) -> list[str]:
    """Patterns of files that need not be downloaded; the full set when the hub is off and only its cache answers."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return list(WEIGHTS_UNUSED)
    files = HfApi().list_repo_files(name, revision=revision)
    pickles = ["*.bin", "*.pt", "*.pth"] if any(file.endswith(".safetensors") for file in files) else []
    return [*WEIGHTS_UNUSED, *pickles]


def _texts(preferences: list[Preference]) -> list[str]:
    """What the embedded tokenizer is trained on."""
    return [p.prompt + answer for p in preferences for answer in (p.chosen, p.rejected)]


if __name__ == "__main__":
    run_command(main)
