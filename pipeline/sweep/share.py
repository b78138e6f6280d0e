"""Stages that no swept key changes run once: the points take what they made, as hard links."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace

from pipeline.config.schema import Config
from pipeline.run import provenance
from pipeline.run.directory import Artifact, Outputs, RunDir
from pipeline.run.hashing import HashCache, fingerprint
from pipeline.run.lock import lock
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.state import set_state
from pipeline.scheduler.submit import save_config
from pipeline.stages.base import Context, Stage
from pipeline.stages.execute import link_artifacts, next_attempt, prune
from pipeline.stages.plan import basis
from pipeline.stages.registry import REGISTRY

BEFORE_TRAINING = ("prefetch", "sft", "reward-model", "sandbox", "convert")
"""What may be shared, in order. A training is what a sweep is about."""


def shared_stages(shared: RunDir, configs: Sequence[Config], selected: Sequence[str]) -> tuple[str, ...]:
    """Those of the selected stages whose settings, and all whose inputs, are the same at every point."""
    hashes = HashCache(shared.root / "cache" / "hashes.json")
    contexts = [Context(shared, config, hashes) for config in configs]
    same: list[str] = []
    for name in BEFORE_TRAINING:
        if name not in selected:
            continue
        stage = REGISTRY[name]
        needs = {stage.needs(config) for config in configs}
        inputs_same = len(needs) == 1 and all(
            need in same or (need not in selected and shared.outputs(need) is not None) for need in next(iter(needs))
        )
        if inputs_same and len({fingerprint(stage.settings(context)) for context in contexts}) == 1:
            same.append(name)
    return tuple(same)


def take(shared: RunDir, run: RunDir, config: Config) -> list[str]:
    """Give a point's run what the shared run made and the point would make likewise; returns the stages' names.

    The fingerprint decides, as it does whether a stage runs again. While jobs of the point live, nothing is touched.
    """
    taken: list[str] = []
    with lock(run.submit_lock, "taking what the sweep shares"):
        if submissions.busy(run) is not None:
            return taken
        context = Context(run, config, HashCache(run.root / "cache" / "hashes.json"))
        for name in BEFORE_TRAINING:
            made, stage = shared.outputs(name), REGISTRY[name]
            if made is None or any(run.outputs(need) is None for need in stage.needs(config)):
                continue
            if fingerprint(basis(stage, context)) == made.fingerprint and not _has(context, stage, made):
                _take(shared, run, stage, made)
                taken.append(name)
        if taken:  # there may be nothing else to submit
            save_config(run, config)
            provenance.write(run)
    return taken


def _has(context: Context, stage: Stage, made: Outputs) -> bool:
    """Whether the point holds the very same already."""
    own = context.run.outputs(stage.name)
    if own is None or Stage.missing(stage, context, own) is not None:
        return False
    same = {name: artifact.sha256 for name, artifact in made.artifacts.items()}
    return (own.values, {name: artifact.sha256 for name, artifact in own.artifacts.items()}) == (made.values, same)


def _take(shared: RunDir, run: RunDir, stage: Stage, made: Outputs) -> None:
    number = next_attempt(run, stage.name)
    source, target = shared.attempt(stage.name, made.attempt), run.attempt(stage.name, number)
    # The job's process and command line were the shared run's.
    shutil.copytree(
        source,
        target,
        ignore=shutil.ignore_patterns("job.json"),
        copy_function=_link,
        dirs_exist_ok=True,
        symlinks=True,
    )
    artifacts = {}
    for name, artifact in made.artifacts.items():
        within = (shared.root / artifact.path).relative_to(source)
        artifacts[name] = Artifact(str((target / within).relative_to(run.root)), artifact.sha256, artifact.bytes)
    run.write_outputs(replace(made, attempt=number, artifacts=artifacts))
    link_artifacts(run, stage.name, artifacts)
    set_state(run, stage.name, made.submission, "done", f"shared: {stage.headline(made.values)}", number)
    prune(run, stage.name, number)


def _link(source: str, target: str) -> None:
    """A hard link: what a stage made is never written to again. A copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
