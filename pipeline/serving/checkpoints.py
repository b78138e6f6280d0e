"""Finding a reward model's weights among a checkpoint's files, by what the files hold and never by their order."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.serving.tensors import SUFFIXES, Lazy, Unreadable, read_tensors

HEAD = re.compile(r"(^|\.)(score|v_head|value_head|reward_head|rm_head|classifier)\.(weight|bias)$")
"""What the layer that gives the reward is called, in the layouts that are read."""
LM_HEAD = re.compile(r"(^|\.)(lm_head\.(weight|bias)|embed_out\.weight)$")
"""The output layer of a language model, which has nothing to do with a reward."""
_INDEX = ".index.json"
_SHOWN = 6


@dataclass(frozen=True)
class Weights:
    """A reward model's weights under the checkpoint's own names."""

    name: str
    """The file, or the shards' index."""
    files: tuple[Path, ...]
    tensors: dict[str, Lazy]


def find_weights(source: Path) -> Weights:
    """The one file (or the one set of shards) in folder `source` that holds a reward model; `source` may be the file.

    UserError when none does, saying what each holds, or when several do, naming them.
    """
    if not source.exists():
        raise UserError(f"{source}: no such folder; give a checkpoint's folder or a hub id")
    found, passed = [], []
    for name, files in _candidates(source):
        try:
            tensors = _read(files)
        except Unreadable as error:
            passed.append(f"{name} {error}")
            continue
        fault = _not_a_reward_model(tensors)
        if fault is None:
            found.append(Weights(name, files, tensors))
        else:
            passed.append(f"{name} {fault}")
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(one.name for one in found)
        raise UserError(f"{source}: {names} each hold a reward model; leave only the one that is meant in the folder")
    if not passed:
        raise UserError(f"{source}: holds no file of weights ({', '.join(SUFFIXES)}); give a whole checkpoint")
    more = f"; and {len(passed) - _SHOWN} more" if len(passed) > _SHOWN else ""
    raise UserError(
        f"{source}: no file holds a reward model, a transformer with a reward head (score or v_head): "
        f"{'; '.join(passed[:_SHOWN])}{more}"
    )


def _candidates(source: Path) -> Iterator[tuple[str, tuple[Path, ...]]]:
    """Name and files of whatever may be weights: sets of shards by their index, then each other file."""
    if source.is_file():
        yield source.name, (source,)
        return
    files = sorted(path for path in source.iterdir() if path.is_file())
    in_sets: set[Path] = set()
    for index in files:
        if index.name.endswith(tuple(suffix + _INDEX for suffix in SUFFIXES)):
            shards = _shards(index)
            in_sets.update(shards)
            yield index.name, shards
    for path in files:
        if path.suffix in SUFFIXES and path not in in_sets:
            yield path.name, (path,)


def _shards(index: Path) -> tuple[Path, ...]:
    """The files that an index names; UserError when one is not there."""
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: not an index of shards (no weight_map); fetch the checkpoint again") from None
    for name in names:
        if not (index.parent / name).is_file():
            raise UserError(f"{index}: names {name}, which is not there; fetch the checkpoint again")
    return tuple(index.parent / name for name in names)


def _read(files: Sequence[Path]) -> dict[str, Lazy]:
    tensors: dict[str, Lazy] = {}
    for file in files:
        for key, tensor in read_tensors(file).items():
            if key in tensors:
                raise UserError(f"{file}: holds {key}, which {tensors[key].file.name} holds too; fetch it again")
            tensors[key] = tensor
    return tensors


def _not_a_reward_model(tensors: dict[str, Lazy]) -> str | None:
    """What tensors are, in words, that are no reward model's; None for one."""
    heads = [key for key in tensors if HEAD.search(key) and key.endswith(".weight")]
    if heads and len(tensors) > len(heads):
        return None
    if heads:
        return f"holds nothing but {heads[0]}"
    if any(LM_HEAD.search(key) for key in tensors):
        return "holds a language model, without a reward head"
    return f"holds {len(tensors)} tensors ({next(iter(tensors))}, ...) but no reward head"
