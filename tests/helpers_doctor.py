"""Configurations and findings, for the doctor's tests."""

from __future__ import annotations

from pipeline.config import load
from pipeline.config.schema import Config
from pipeline.site.findings import Finding

ON_SLURM = {"name": "site", "executor": "slurm", "stages": {"train": {"gpus": 8}}}


def config(*overrides: str, preset: str = "gptj", cluster: dict[str, object] | None = None) -> Config:
    tree = load.load_preset(preset)
    return load.resolve({**tree, "cluster": cluster} if cluster else tree, overrides)


def faults(findings: list[Finding]) -> list[str]:
    return [each.what for each in findings if each.level == "fail"]


def warnings(findings: list[Finding]) -> list[str]:
    return [each.what for each in findings if each.level == "warn"]
