"""Any reward model that is read, as a Hugging Face sequence classification folder with safetensors weights."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.run import atomic
from pipeline.serving.checkpoints import Weights, find_weights
from pipeline.serving.layouts import Architecture, architecture, arrange, vocabulary
from pipeline.serving.model_store import TOKENIZER_FILES
from pipeline.serving.tensors import Lazy, save_tensors, write_index

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LACKING = "give the model that it was trained from (--base-model, in a run reward_model.checkpoint_base)"
_CLASS = "ForSequenceClassification"

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def prepared(source: Path, base: Path | None, scratch: Path) -> Iterator[Path]:
    """`scratch`, holding the reward model of `source` while the block runs.

    `source` is a checkpoint's folder, or its file of weights. Configuration and tokenizer, where it has none, are
    those of folder `base`. Weights that already are what is wanted are linked, others written in their own dtypes.
    """
    shutil.rmtree(scratch, ignore_errors=True)  # of a conversion that was killed
    try:
        with atomic.disk_errors(scratch):
            scratch.mkdir(parents=True)
            _prepare(source, base, scratch)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _prepare(source: Path, base: Path | None, target: Path) -> None:
    weights = find_weights(source)
    folder = source if source.is_dir() else source.parent
    config, where, own = _config(folder, base)
    wanted = architecture(config, where)
    if not own:
        wanted = _resized(config, where, weights, wanted)
    tensors = arrange(weights, wanted, where)
    logger.info("%s: %d weights of a %s from %s", source, len(tensors), wanted.name, weights.name)
    if own and wanted.name in (_raw(where).get("architectures") or ()):
        shutil.copyfile(where, target / "config.json")
    else:
        config.architectures = [wanted.name]
        config.save_pretrained(target)
    _place_tokenizer(folder, base, target, wanted.shapes[wanted.embedding][0])
    if not _link(weights, tensors, target):
        save_tensors(target, tensors)


def _config(folder: Path, base: Path | None) -> tuple[PretrainedConfig, Path, bool]:
    """The model's configuration with one label, its file, and whether it is the checkpoint's own.

    UserError where there is none, where the checkpoint and its base are of two kinds, or where it has more labels.
    """
    found = [_load_config(one) for one in (folder, base) if one is not None]
    known = [one for one in found if one is not None]
    if not known:
        raise UserError(f"{folder}: holds no config.json of a known model; {_LACKING}")
    kinds = {config.model_type for config, _ in known}
    if len(kinds) > 1:
        words = " and ".join(f"{where} is of a {config.model_type}" for config, where in known)
        raise UserError(f"{words}; give the base model that the checkpoint was trained from")
    config, where = known[0]
    own = where.parent == folder
    raw = _raw(where)
    if own and any(name.endswith(_CLASS) for name in raw.get("architectures") or ()):
        check_labels(raw, where)
    config.num_labels = 1
    return config, where, own


def check_labels(raw: Mapping[str, Any], where: Path) -> None:
    """UserError when the classifier that the config.json `where` describes has not exactly one label."""
    labels = len(raw["id2label"]) if "id2label" in raw else raw.get("num_labels", 2)
    if labels != 1:
        raise UserError(f"{where}: the model has {labels} labels; a reward model has exactly one (num_labels = 1)")


def _load_config(folder: Path) -> tuple[PretrainedConfig, Path] | None:
    """A folder's configuration and its file; None where it has none of a model that transformers knows."""
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True), path
    except (ValueError, KeyError) as error:
        logger.info("%s: not used: %s", path, " ".join(str(error).split())[:200])
        return None
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read ({reason}); fetch the checkpoint again") from error


def _raw(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def _resized(config: PretrainedConfig, where: Path, weights: Weights, wanted: Architecture) -> Architecture:
    """The architecture with the checkpoint's vocabulary, where tokens were added to the base model's or cut off."""
    rows, old = vocabulary(weights, wanted), wanted.shapes[wanted.embedding][0]
    if rows is None or rows == old:
        return wanted
    logger.info("%s: %d tokens where the base model has %d", weights.name, rows, old)
    config.vocab_size = rows
    return architecture(config, where)


def _place_tokenizer(folder: Path, base: Path | None, target: Path, rows: int) -> None:
    """Copy the checkpoint's tokenizer, or else its base model's, and see that the model has the ids that it gives."""
    from transformers import AutoTokenizer

    owner = next((one for one in (folder, base) if one is not None and _has_tokenizer(one)), None)
    if owner is None:
        raise UserError(f"{folder}: has no tokenizer; save it there, or {_LACKING}")
    for name in TOKENIZER_FILES:
        if (owner / name).is_file():
            shutil.copyfile(owner / name, target / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200].replace(str(target), str(owner))
        raise UserError(f"{owner}: its tokenizer cannot be loaded ({reason}); save it again") from error
    # Special tokens that were added beside the vocabulary, as for padding, never stand in what is scored; EOS does.
    unused = set(tokenizer.get_added_vocab()) - {tokenizer.eos_token}
    last = max((index for token, index in tokenizer.get_vocab().items() if token not in unused), default=-1)
    if last >= rows:
        raise UserError(
            f"{owner}: its tokenizer has ids up to {last}, the model's embeddings only {rows} rows; take the "
            "tokenizer that the reward model was trained with"
        )


def _has_tokenizer(folder: Path) -> bool:
    vocabularies = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    return any((folder / name).is_file() for name in vocabularies)


def _link(weights: Weights, tensors: dict[str, Lazy], target: Path) -> bool:
    """Link the checkpoint's files where they hold these weights under these names and nothing else."""
    as_they_are = all(tensor.key == name for name, tensor in tensors.items())
    safe = all(file.suffix == ".safetensors" for file in weights.files)
    if not safe or not as_they_are or len(tensors) != len(weights.tensors):
        return False
    if len(weights.files) == 1:
        (target / "model.safetensors").symlink_to(weights.files[0].resolve())
        return True
    for file in weights.files:
        (target / file.name).symlink_to(file.resolve())
    write_index(
        target,
        {name: tensor.file.name for name, tensor in tensors.items()},
        sum(tensor.bytes for tensor in tensors.values()),
    )
    return True
