"""What the profile and configuration name and this machine can try out: modules, and image files."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.config.schema import Config
from pipeline.site.ask import Answer, ask
from pipeline.site.findings import Finding

TOPIC = "Cluster profile"


@dataclass(frozen=True)
class NamedFacts:
    """What was tried."""

    modules: Answer | None = None
    """What bash said while it loaded the profile's modules, as a job does; None without modules."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Files that are not there, by the key that names them."""


def probe(config: Config) -> NamedFacts:
    """Load the modules in a shell, and look for the files."""
    modules = config.cluster.modules if config.cluster.executor == "slurm" else ()
    script = " && ".join(f"module load {shlex.quote(module)}" for module in modules)
    files = {"cluster.trainer_image": config.cluster.trainer_image or "", "sandbox.image": _file(config.sandbox.image)}
    missing = {key: path for key, path in files.items() if path and not os.path.exists(os.path.expanduser(path))}
    return NamedFacts(ask(["bash", "-c", script]) if modules else None, missing)


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
    for key, path in facts.missing.items():
        findings.append(Finding(TOPIC, "fail", f"{key}: {path} is not there", "correct the path, or build the image"))
    return findings


def _file(image: str) -> str:
    """The file or folder that an image is, or is archived in; "" where it comes from a registry."""
    kind, colon, rest = image.partition(":")
    if colon and kind in ("docker-archive", "oci-archive"):
        return re.sub(r":[\w.-]+$", "", rest)  # a tag may follow the path
    return image if image.startswith(("/", "~", "./")) or image.endswith((".sif", ".def")) else ""
