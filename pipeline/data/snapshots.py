"""Snapshots of the Hugging Face hub: one commit of a model or data set, whole, in the hub's own cache."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.hub import hub_errors, is_hub_fault
from pipeline.errors import UserError
from pipeline.run.sources import SETTINGS, Pin

WEIGHTS_UNUSED = ("*.msgpack", "*.h5", "*.onnx", "*.ot", "*.tflite", "*.gguf", "original/*")
"""Other frameworks' copies of the weights, which nothing here reads."""
_TRAINING_STATES = (
    *("optimizer*", "*optim_states*", "scheduler*", "rng_state*", "scaler.pt", "training_args.bin"),
    *("*/*.safetensors", "*/*.bin", "*/*.pt", "*/*.pth"),
)
"""What a training leaves beside its model's weights, which lie at the top."""
_PICKLES = ("*.bin", "*.pt", "*.pth")
_DESCRIPTION = ("*.json", "*.txt", "tokenizer.model")
"""A model's configuration and tokenizer."""
_DESCRIPTION_ONLY = ("tokenizer", "checkpoint_base")
"""Sources of whose weights there is no need."""
_ABBREVIATED = re.compile(r"[0-9a-f]{7,39}")
_REMEDY = "run --stage prefetch where the hub can be reached, correct the name, or give a folder"


def fetch_model(key: str, name: str, revision: str | None, commit: str | None, setting: str | None = None) -> Pin:
    """Fetch the model `name` (or only its description) at `commit`, or where that is None at `revision` as it is now.

    The hub's client goes on with downloads that were cut off. Where the hub is off or does not answer, what its cache
    holds is taken, if it is whole. `setting` is what errors call the source.
    """
    from huggingface_hub import snapshot_download

    place = f"{setting or SETTINGS[key]}: {name}"
    remedy = _REMEDY if setting is None else "correct the name, go where the hub can be reached, or give a folder"
    wanted = _DESCRIPTION if key in _DESCRIPTION_ONLY else None
    with hub_errors(f"{place}: neither a folder nor to be had from the hub", remedy):
        at = commit or _whole_commit(name, revision)
        # Pickled weights are left out where safetensors are there; which of the two, the listing tells.
        unused = _unused(_listing(name, at))
        folder = Path(snapshot_download(name, revision=at, ignore_patterns=unused, allow_patterns=wanted))
    kinds = (".bin", ".pt", ".pth") if key == "reward_model" else (".bin",)
    fault = None if wanted is not None else missing_weights(folder, kinds)
    if fault is not None:
        raise UserError(f"{place}: {folder}: {fault}; {remedy}")
    return _pin(name, revision, folder, unused, wanted)


def fetch_data(name: str, revision: str | None, commit: str | None, subsets: Sequence[str]) -> Pin:
    """Fetch a data set, or only some of its folders, like a model."""
    from huggingface_hub import snapshot_download

    wanted = [*(f"{subset}/*" for subset in subsets), "README.md"] if subsets else None
    with hub_errors(f"{SETTINGS['data']}: {name}: neither a folder nor to be had from the hub", _REMEDY):
        found = snapshot_download(name, repo_type="dataset", revision=commit or revision, allow_patterns=wanted)
    return _pin(name, revision, Path(found), ())


def _whole_commit(name: str, revision: str | None) -> str | None:
    """The revision; an abbreviated commit in full, as the cache and the pins need it."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RevisionNotFoundError

    if revision is None or not _ABBREVIATED.fullmatch(revision):
        return revision
    cached = [path.name for path in (_cache_of(name) / "snapshots").glob(f"{revision}*")]
    if len(cached) == 1:
        return cached[0]
    if constants.HF_HUB_OFFLINE:
        return revision
    try:
        whole: str | None = HfApi().model_info(name, revision=revision).sha
    except RevisionNotFoundError:  # a hub that knows whole names only
        commits: list[str] = [commit.commit_id for commit in HfApi().list_repo_commits(name)]
        found = [commit for commit in commits if commit.startswith(revision)]
        if len(found) != 1:
            many = "several commits begin" if found else "no commit of the main branch begins"
            raise ValueError(f"{many} with {revision}") from None
        whole = found[0]
    return whole


def missing_weights(folder: Path, pickles: Sequence[str] = (".bin",)) -> str | None:
    """What a model's folder lacks of its weights, in words; None when nothing. `pickles`: suffixes that are read."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    kinds = (".safetensors",) if any(name.endswith(".safetensors") for name in names) else tuple(pickles)
    for index in sorted(name for name in names if name.endswith(tuple(f"{kind}.index.json" for kind in kinds))):
        shards = set(json.loads((folder / index).read_text("utf-8"))["weight_map"].values())
        if lost := sorted(shards - names):
            return f"{index} names {lost[0]}, which is not there"
    return None if any(name.endswith(kinds) for name in names) else "there are no weights in it (safetensors or .bin)"


def _pin(
    name: str, revision: str | None, folder: Path, unused: Sequence[str], wanted: Sequence[str] | None = None
) -> Pin:
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    # Files that another program left in the cache, and may remove, are none of ours.
    ours = {file: size for file, size in files.items() if not _matches(file, unused)}
    if wanted is not None:
        ours = {file: size for file, size in ours.items() if _matches(file, wanted)}
    return Pin(name, revision, folder.name, str(folder), ours)


def _matches(file: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(file, one) for one in patterns)


def _unused(files: Sequence[str]) -> list[str]:
    """Patterns of files that need not be downloaded."""
    has_safetensors = any(file.endswith(".safetensors") and "/" not in file for file in files)
    return [*WEIGHTS_UNUSED, *_TRAINING_STATES, *(_PICKLES if has_safetensors else ())]


def _listing(name: str, revision: str | None) -> list[str]:
    """The repository's files; those in the cache where the hub is off or does not answer."""
    from huggingface_hub import HfApi, constants

    cached = _cached_files(_cache_of(name), revision or "main")
    if constants.HF_HUB_OFFLINE:
        return cached
    try:
        return list(HfApi().list_repo_files(name, revision=revision))
    except Exception as error:
        if not cached or not is_hub_fault(error):
            raise
        return cached


def _cache_of(name: str) -> Path:
    """A model's folder in the hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def _cached_files(repository: Path, revision: str) -> list[str]:
    """Files of a snapshot in the cache, whose layout the hub documents: snapshots/<commit>, and refs/<branch>."""
    ref = repository / "refs" / revision
    commit = ref.read_text("utf-8").strip() if ref.is_file() else revision
    folder = repository / "snapshots" / commit
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
