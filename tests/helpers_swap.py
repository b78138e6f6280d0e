"""A run whose reward model is in a store that a test has made."""

from __future__ import annotations

from pathlib import Path

from pipeline.run.directory import Artifact, Outputs, RunDir


def converted(run: RunDir, identity: str, store: Path) -> None:
    artifacts = {"model_store": Artifact(str(store), "0", 0)}
    run.write_outputs(Outputs("convert", "f", 1, artifacts, {"identity": identity}))
