"""What a stage is: what it needs, what determines its result, and the command that does its work."""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pipeline.config.schema import Config
from pipeline.run import hashing
from pipeline.run.directory import Outputs, RunDir
from pipeline.run.sources import models_of, pinned
from pipeline.stages.nodes import ONE_NODE, Nodes


@dataclass(frozen=True)
class Context:
    """What planning a stage may look at."""

    run: RunDir
    config: Config
    hashes: hashing.HashCache


@dataclass(frozen=True)
class Work:
    """One attempt at a stage, inside its job."""

    run: RunDir
    config: Config
    out: Path
    devices: tuple[str, ...] = ()
    """GPUs that this stage may use, as CUDA_VISIBLE_DEVICES names them; empty on a CPU."""
    cpus: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    nodes: Nodes = ONE_NODE
    """The nodes that the work is spread over, and which of them this is."""


class Stage(ABC):
    """A stage of the pipeline. Subclasses are stateless; one module holds one stage."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when the stage's work changes so that old results are no longer what it would make."""
    offline: ClassVar[bool] = True
    """Whether the work runs with the model hub switched off, as on compute nodes."""
    contained: ClassVar[bool] = True
    """Whether the work runs in the trainer's image where there is one; what starts containers itself does not."""

    @abstractmethod
    def settings(self, context: Context) -> dict[str, Any]:
        """The part of the configuration, and of the world outside the run, that determines the result."""

    def needs(self, config: Config) -> tuple[str, ...]:
        """Stages whose outputs this one reads."""
        return ()

    def after(self, config: Config) -> tuple[str, ...]:
        """Stages that come first where they run, though nothing of theirs enters the result."""
        return ()

    @abstractmethod
    def command(self, work: Work) -> list[str]:
        """The command line that does the work."""

    def environment(self, work: Work) -> dict[str, str]:
        """Environment variables of the work, beyond those of every stage."""
        return {}

    def missing(self, context: Context, outputs: Outputs) -> str | None:
        """Why a finished stage's outputs cannot be used any more, or None. Sizes only: hashing is for consumers."""
        for name, artifact in outputs.artifacts.items():
            size = hashing.tree_bytes(context.run.root / artifact.path)
            if size < 0:
                return f"its artifact {name} is gone ({artifact.path})"
            if size != artifact.bytes:
                return f"its artifact {name} has {size} bytes, not {artifact.bytes} ({artifact.path})"
        return None

    def headline(self, values: dict[str, Any]) -> str:
        """A finished stage's result in a few words, for the terminal."""
        return ""


def module_command(module: str, work: Work) -> list[str]:
    """`python -m module --run RUN --out OUT` with this interpreter."""
    return [sys.executable, "-m", module, *work_arguments(work)]


def work_arguments(work: Work) -> list[str]:
    """The arguments that every work command takes."""
    return ["--run", str(work.run.root), "--out", str(work.out)]


def digest(outputs: Outputs) -> str:
    """Identifies a stage's result by content; a stage without artifacts gives its `key` value."""
    content: dict[str, Any] = {name: artifact.sha256 for name, artifact in outputs.artifacts.items()}
    if "key" in outputs.values:
        content["key"] = outputs.values["key"]
    return hashing.fingerprint(content)


def model_identity(context: Context, key: str) -> dict[str, Any]:
    """Identifies a model that the run does not make: a folder by content, a hub id by the commit that was fetched."""
    name, revision = models_of(context.config)[key]
    folder = Path(name)
    if folder.is_dir():
        return {"folder_sha256": hashing.hash_tree(folder, context.hashes)[0]}
    pin = pinned(context.run, key, name, revision)
    return {"hub_id": name, "revision": revision, "commit": pin.commit if pin is not None else None}


def tokenizer_identity(context: Context) -> dict[str, Any]:
    """{"tokenizer": ...} where it is not the model's own, else nothing."""
    return {"tokenizer": model_identity(context, "tokenizer")} if context.config.model.tokenizer_path else {}


def number(value: Any, digits: int = 3) -> str:
    """A float for people; "n/a" where there is none."""
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else "n/a"
