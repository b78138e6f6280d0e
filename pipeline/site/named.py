"""What the profile and configuration name and this machine can try out: modules, and image files."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass

from pipeline.config.schema import Config
from pipeline.containers.command import ENGINES
from pipeline.containers.source import parse_source
from pipeline.errors import UserError
from pipeline.site.ask import Answer, ask
from pipeline.site.findings import Finding

TOPIC = "Cluster profile"


@dataclass(frozen=True)
class NamedFacts:
    """What was tried."""

    modules: Answer | None = None
    """What bash said while it loaded the profile's modules, as a job does; None without modules."""
    faults: tuple[str, ...] = ()
    """What is wrong with the images that are named."""


def probe(config: Config, engine: str) -> NamedFacts:
    """Load the modules in a shell, and look for the images that are files."""
    modules = config.cluster.modules if config.cluster.executor == "slurm" else ()
    script = " && ".join(f"module load {shlex.quote(module)}" for module in modules)
    faults = []
    if engine in ENGINES:
        try:
            parse_source(config.sandbox.image)
        except UserError as error:
            faults.append(str(error))
    trainer = config.cluster.trainer_image
    if trainer and not os.path.exists(os.path.expanduser(trainer)):
        faults.append(f"cluster.trainer_image: {trainer}: no such image here")
    return NamedFacts(ask(["bash", "-c", script]) if modules else None, tuple(faults))


def judge(facts: NamedFacts, config: Config) -> list[Finding]:
    """What is named and is not there."""
    findings = []
    if facts.modules is not None:
        names = ", ".join(config.cluster.modules)
        if facts.modules.ok:
            findings.append(Finding(TOPIC, "ok", f"cluster.modules: {names} can be loaded here"))
        else:
            what = f"cluster.modules: loading {names} fails here, as it would in each job: {facts.modules.line}"
            findings.append(Finding(TOPIC, "fail", what, "correct the names (module avail), or leave them out"))
    remedy = "correct the path, or build the image (containers/)"
    findings += [Finding(TOPIC, "fail", fault, remedy) for fault in facts.faults]
    return findings
