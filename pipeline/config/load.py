"""From preset, file and dotted overrides to a checked `Config`, with errors of one line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.names import SUMMARY, file_and_size, preset_names
from pipeline.config.schema import Config
from pipeline.errors import UserError, nearest
from pipeline.resources import resource_dir, resource_names

Tree = dict[str, Any]


def load_yaml(path: Path) -> Tree:
    """Parse a YAML file that must hold a mapping."""
    try:
        value = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, found {type(value).__name__}")
    return value


def load_preset(name: str) -> Tree:
    """Return a preset's tree. A method without a size is GPT-J's.

    Its block ORIGINAL is still in it: what `fidelity: trlx` lays on the rest.
    """
    if name not in preset_names():
        raise UserError(f"--preset {name}: unknown preset{nearest(name, preset_names())}; there are: {SUMMARY}")
    file, size = file_and_size(name)
    tree = _load_file(file)
    sizes = tree.pop("sizes", {})
    return merge(tree, sizes[size]) if size else tree


def _load_file(name: str) -> Tree:
    """A preset's file, laid on the one that it names as its `base`. What differs by size is in `sizes`."""
    tree = load_yaml(resource_dir("presets") / f"{name}.yaml")
    base = tree.pop("base", None)
    return merge(_load_file(base), tree) if base else tree


def load_cluster(name_or_file: str) -> Tree:
    """Return a cluster profile's tree: a file, or the name of one in slurm/."""
    path = Path(name_or_file)
    if path.suffix in {".yaml", ".yml"} or path.exists():
        return load_yaml(path)
    names = resource_names("slurm", ".yaml")
    if name_or_file not in names:
        raise UserError(
            f"--cluster {name_or_file}: no such file or profile{nearest(name_or_file, names)}; "
            f"profiles: {', '.join(names)}"
        )
    return load_yaml(resource_dir("slurm") / f"{name_or_file}.yaml")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """Return `base` with `over` laid on it, mapping by mapping; any other value is replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def parse_override(text: str) -> Tree:
    """Turn "ppo.lam=0.9" into {"ppo": {"lam": 0.9}}; the value is read as YAML."""
    dotted, equals, value = text.partition("=")
    if not equals or not all(part for part in dotted.split(".")):
        raise UserError(f"--set {text}: expected key=value with a dotted key, as in --set ppo.init_kl_coef=0.1")
    try:
        tree: Any = yaml.safe_load(value) if value else ""
    except yaml.YAMLError as error:
        raise UserError(f"--set {text}: the value is not valid YAML: {' '.join(str(error).split())}") from None
    for part in reversed(dotted.split(".")):
        tree = {part: tree}
    assert isinstance(tree, dict)
    return tree


def resolve(tree: Tree, overrides: Sequence[str] = (), cluster: str | None = None, where: str = "") -> Config:
    """Lay overrides and a cluster profile over `tree` and check the whole. `where` names the tree's source.

    `fidelity: trlx` first lays a preset's block of that name on the rest. Files and folders that exist are written
    with their absolute paths: jobs and later commands that read the configuration may run in another directory.
    """
    asked: Tree = {}
    for text in overrides:
        asked = merge(asked, parse_override(text))
    tree = _with_fidelity(tree, asked.get("fidelity", tree.get("fidelity")), where)
    if cluster is not None:
        tree = {**tree, "cluster": load_cluster(cluster)}
    return check(_with_absolute_paths(merge(tree, asked)), where)


ORIGINAL = "trlx"
"""The fidelity, and the block of a preset, that hold what the original does where the preset corrects it."""


def _with_fidelity(tree: Tree, fidelity: object, where: str) -> Tree:
    """A preset's tree with the original's settings laid on it, or without them.

    A run's own configuration holds its fidelity, and nothing of what another would be: that needs the preset anew.
    """
    tree = dict(tree)
    original = tree.pop(ORIGINAL, None)
    if "fidelity" in tree:
        if fidelity != tree["fidelity"]:
            name = tree.get("preset", "NAME")
            raise UserError(
                f"fidelity: {where or 'this configuration'} was made with {tree['fidelity']}; to change it, begin from "
                f"the preset: --preset {name} --set fidelity={fidelity}"
            )
    elif fidelity == ORIGINAL:
        if original is None:
            raise UserError(
                f"fidelity: {ORIGINAL}: preset {tree.get('preset', 'custom')} corrects nothing of the original's; "
                "leave it out"
            )
        tree = merge(tree, original)
    return tree


def check(tree: Tree, where: str = "") -> Config:
    """Build a `Config`; on a fault raise UserError with the key, the fault and the nearest valid key."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        prefix = f"{where}: " if where else ""
        raise UserError(prefix + _first_fault(error)) from None


def dump(config: Config) -> str:
    """The configuration as YAML, complete and in schema order."""
    header = "# The run's resolved configuration: the only one that its stages read.\n"
    return header + yaml.safe_dump(config.plain(), sort_keys=False, allow_unicode=True, width=100)


def read_config(run: Path) -> Config:
    """Read runs/<name>/config.yaml."""
    path = run / "config.yaml"
    return check(load_yaml(path), str(path))


_PATHS: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("model", "path", lambda path: path != "embedded" and os.path.isdir(path)),
    ("model", "tokenizer_path", os.path.isdir),
    ("data", "source", lambda path: path not in ("demo", "hh") and os.path.isdir(path)),
    ("reward_model", "checkpoint", os.path.isdir),
    ("reward_model", "checkpoint_base", os.path.isdir),
    ("sft", "accelerate_config", lambda path: path.endswith((".yaml", ".yml")) and os.path.isfile(path)),
    ("reward_model", "accelerate_config", lambda path: path.endswith((".yaml", ".yml")) and os.path.isfile(path)),
    ("train", "accelerate_config", lambda path: path.endswith((".yaml", ".yml")) and os.path.isfile(path)),
    ("sandbox", "image", os.path.exists),
    ("cluster", "trainer_image", os.path.exists),
    ("sandbox", "cache_dir", bool),  # always a folder, though it may have to be made
    ("serving", "baseline_cache", bool),
    ("cluster", "cache", bool),
)
"""Settings that may name a file or folder, and how to tell that one does: a hub id or a name must stay what it is."""


def _with_absolute_paths(tree: Tree) -> Tree:
    for section, key, is_path in _PATHS:
        values = tree.get(section)
        value = values.get(key) if isinstance(values, dict) else None
        if isinstance(value, str) and is_path(path := os.path.expandvars(os.path.expanduser(value))):
            tree = merge(tree, {section: {key: os.path.abspath(path)}})
    image = tree["sandbox"].get("image") if isinstance(tree.get("sandbox"), dict) else None
    if isinstance(image, str) and image.startswith(("oci-archive:", "docker-archive:")):
        transport, _, file = image.partition(":")
        image = f"{transport}:{os.path.abspath(os.path.expanduser(file))}"
        tree = merge(tree, {"sandbox": {"image": image}})
    return tree


_TRIED_TYPE = re.compile(r"(constrained-)?(int|float|str|bool)|literal\[.*\]")
"""How pydantic ends the location of a fault in a setting of several types, as in train.num_processes.int."""


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    location = [str(part) for part in fault["loc"]]
    key = ".".join(location)
    if fault["type"] == "extra_forbidden":
        section = _section(location[:-1])
        valid = sorted(section.model_fields) if section else []
        hint = nearest(location[-1], valid) or f"; valid keys: {', '.join(valid)}"
        return f"{key}: unknown key{hint}"
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    message = fault["msg"][:1].lower() + fault["msg"][1:]
    if _TRIED_TYPE.fullmatch(location[-1]):
        key = ".".join(location[:-1])
    return f"{key}: {message}, but it is {fault['input']!r}"


def _section(location: Sequence[str]) -> type[BaseModel] | None:
    """The model class at a dotted place of the schema, or None where there is none."""
    section: type[BaseModel] = Config
    parts = iter(location)
    for part in parts:
        field = section.model_fields.get(part)
        if field is None:
            return None
        annotation = field.annotation
        if get_origin(annotation) is dict and next(parts, None) is not None:
            annotation = get_args(annotation)[1]  # cluster.stages.<stage>
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        section = annotation
    return section
