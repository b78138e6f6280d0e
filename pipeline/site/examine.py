"""The whole examination: what there is (asked once), what this run and profile need of it, and the findings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config.schema import Config
from pipeline.run.directory import RunDir
from pipeline.site import engine as engines
from pipeline.site import folders, gpus, machine, named, network, slurm, slurm_here, slurm_profile, storage, trial
from pipeline.site.ask import together
from pipeline.site.findings import Finding

Facts = TypeVar("Facts")
_DEADLINE_S = 20.0
"""Seconds for the trials of a profile: a busy controller takes its time."""


@dataclass(frozen=True)
class Site:
    """What does not depend on a run or profile."""

    slurm: slurm.SlurmFacts
    engine: engines.EngineFacts
    gpus: gpus.GpuFacts
    machine: machine.MachineFacts


def look() -> Site:
    """Ask Slurm, the engines, the driver and this Python, all at once."""
    questions: dict[str, Callable[[], Any]] = {
        "slurm": slurm.probe,
        "engine": engines.probe,
        "gpus": gpus.probe,
    }
    answers = together(questions)
    return Site(
        answers["slurm"] or slurm.SlurmFacts(ping="its commands hang"),
        answers["engine"] or engines.EngineFacts(venv_fault="nothing on this machine could be asked in time"),
        answers["gpus"] or gpus.GpuFacts(fault="it hangs"),
        machine.probe(),
    )


def examine(site: Site, run: RunDir, config: Config) -> list[Finding]:
    """All findings, grouped by topic."""
    engine = engines.wanted(config, site.engine)
    uses = folders.uses(run, config, engine)
    on_slurm = config.cluster.executor == "slurm"
    try_jobs = on_slurm and site.slurm.answers
    questions: dict[str, Callable[[], Any]] = {
        "network": lambda: network.probe(config, engine),
        "folders": lambda: storage.probe({use.name: use.path for use in uses} | {"/dev/shm": Path("/dev/shm")}),
        "named": lambda: named.probe(config, engine),
        "trial": lambda: trial.probe(run, config) if try_jobs else {},
    }
    answers = together(questions, _DEADLINE_S)
    looks = answers["folders"] or {}
    inside_job = site.machine.job is not None
    found = [
        *machine.judge(site.machine, config, _training_gpus(site, config)),
        *slurm_here.judge(site.slurm, config.cluster),
    ]
    if try_jobs:
        found += slurm_profile.judge(site.slurm, config.cluster, config.all)
        found += _of(answers["trial"], trial.TOPIC, lambda facts: trial.judge(facts, config))
        found += slurm_profile.judge_preemption(site.slurm, config.cluster)
    found += _of(answers["named"], named.TOPIC, lambda facts: named.judge(facts, config))
    found += engines.judge(site.engine, config, inside_job)
    found += gpus.judge(site.gpus, config, engine, _types(site, config), inside_job)
    found += folders.judge(looks, uses, config)
    if engine != "none":
        found += folders.judge_shm(looks.get("/dev/shm"))
    prefetched = run.outputs("prefetch") is not None
    return found + _of(
        answers["network"], network.TOPIC, lambda facts: network.judge(facts, config, prefetched, inside_job)
    )


def _of(facts: Facts | None, topic: str, judge: Callable[[Facts], list[Finding]]) -> list[Finding]:
    """The findings of an examination, or that it did not come to an end."""
    if facts is None:
        return [Finding(topic, "unknown", "not examined: it took too long", "run the doctor again")]
    return judge(facts)


def _training_gpus(site: Site, config: Config) -> int:
    """GPUs that a training would have: what the profile asks Slurm for, or what is here."""
    if config.cluster.executor == "slurm":
        return config.cluster.resources("train").gpus
    return 0 if site.gpus.visible == "" else len(site.gpus.gpus)


def _types(site: Site, config: Config) -> dict[str, int]:
    """Types of the GPUs in the profile's partition, and how many a node has at most."""
    partition = site.slurm.partition(config.cluster.partition)
    kinds = site.slurm.kinds(partition) if partition else []
    names = {name for kind in kinds for name in kind.gpus if name}
    return {name: max(kind.gpu_count(name) for kind in kinds) for name in sorted(names)}
