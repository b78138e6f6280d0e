"""Snapshots of the Hugging Face hub: one commit of a model or data set, whole, in the hub's own cache."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.hub import hub_errors, is_hub_fault
from pipeline.errors import UserError
from pipeline.run.sources import SETTINGS, Pin

WEIGHTS_UNUSED = ("*.msgpack", "*.h5", "*.onnx", "*.ot", "*.tflite", "*.gguf", "original/*")
"""Other frameworks' copies of the weights, which nothing here reads."""
_PICKLES = ("*.bin", "*.pt", "*.pth")
_REMEDY = "run --stage prefetch where the hub can be reached, correct the name, or give a folder"


def fetch_model(key: str, name: str, revision: str | None, commit: str | None) -> Pin:
    """Fetch the model (or tokenizer) `name` at `commit`, or where that is None at `revision` as it is now.

    The hub's client goes on with downloads that were cut off. Where the hub is off or does not answer, what its cache
    holds is taken, if it is whole.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(f"{SETTINGS[key]}: {name}: neither a folder nor to be had from the hub", _REMEDY):
        # Pickled weights are left out where safetensors are there; which of the two, the listing tells.
        unused = _unused(_listing(name, commit or revision))
        folder = Path(snapshot_download(name, revision=commit or revision, ignore_patterns=unused))
    fault = None if key == "tokenizer" else missing_weights(folder)
    if fault is not None:
        raise UserError(f"{SETTINGS[key]}: {name}: {folder}: {fault}; run --stage prefetch where the hub is reached")
    return _pin(name, revision, folder, unused)


def fetch_data(name: str, revision: str | None, commit: str | None, subsets: Sequence[str]) -> Pin:
    """Fetch a data set, or only some of its folders, like a model."""
    from huggingface_hub import snapshot_download

    wanted = [*(f"{subset}/*" for subset in subsets), "README.md"] if subsets else None
    with hub_errors(f"{SETTINGS['data']}: {name}: neither a folder nor to be had from the hub", _REMEDY):
        found = snapshot_download(name, repo_type="dataset", revision=commit or revision, allow_patterns=wanted)
    return _pin(name, revision, Path(found), ())


def missing_weights(folder: Path) -> str | None:
    """What a model's folder lacks of its weights, in words; None when nothing."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    kind = ".safetensors" if any(name.endswith(".safetensors") for name in names) else ".bin"
    for index in sorted(name for name in names if name.endswith(f"{kind}.index.json")):
        shards = set(json.loads((folder / index).read_text("utf-8"))["weight_map"].values())
        if lost := sorted(shards - names):
            return f"{index} names {lost[0]}, which is not there"
    return None if any(name.endswith(kind) for name in names) else "there are no weights in it (safetensors or .bin)"


def _pin(name: str, revision: str | None, folder: Path, unused: Sequence[str]) -> Pin:
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    # Files that another program left in the cache, and may remove, are none of ours.
    ours = {file: size for file, size in files.items() if not any(fnmatch.fnmatch(file, one) for one in unused)}
    return Pin(name, revision, folder.name, str(folder), ours)


def _unused(files: Sequence[str]) -> list[str]:
    """Patterns of files that need not be downloaded."""
    has_safetensors = any(file.endswith(".safetensors") for file in files)
    return [*WEIGHTS_UNUSED, *(_PICKLES if has_safetensors else ())]


def _listing(name: str, revision: str | None) -> list[str]:
    """The repository's files; those in the cache where the hub is off or does not answer."""
    from huggingface_hub import HfApi, constants

    cached = _cached_files(Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}", revision or "main")
    if constants.HF_HUB_OFFLINE:
        return cached
    try:
        return list(HfApi().list_repo_files(name, revision=revision))
    except Exception as error:
        if not cached or not is_hub_fault(error):
            raise
        return cached


def _cached_files(repository: Path, revision: str) -> list[str]:
    """Files of a snapshot in the cache, whose layout the hub documents: snapshots/<commit>, and refs/<branch>."""
    ref = repository / "refs" / revision
    commit = ref.read_text("utf-8").strip() if ref.is_file() else revision
    folder = repository / "snapshots" / commit
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
