"""GPUs: what the driver lists here and Slurm elsewhere, against the server's image, torch, and the profile."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config.schema import Config
from pipeline.run.sources import EMBEDDED
from pipeline.site.ask import Answer, ask, together
from pipeline.site.findings import Finding, Level
from pipeline.site.images import Needs, Version, capability_of_type, driver_fits, needs_of, release_of

TOPIC = "GPUs"
_QUERY = "index,name,driver_version,memory.total,mig.mode.current"
_TORCH_DRIVERS: dict[int, Version] = {11: (450, 80), 12: (525, 60), 13: (580,)}
"""The oldest driver for each major version of CUDA (minor versions are compatible with each other)."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, as nvidia-smi lists it."""

    index: str
    name: str
    driver: Version
    memory_mb: int
    mig: bool
    capability: Version | None = None


@dataclass(frozen=True)
class GpuFacts:
    """This machine's GPUs and the CUDA that torch was built for."""

    gpus: tuple[Gpu, ...] = ()
    fault: str | None = None
    """Why nvidia-smi lists none though it is there; None where it is not there."""
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES."""
    torch: str | None = None
    """torch's version; None where it is not installed."""
    torch_cuda: str | None = None
    """The CUDA that torch was built for; None for a CPU build."""


def probe() -> GpuFacts:
    """Ask nvidia-smi, and read torch's metadata. Nothing imports torch."""
    listing = ["nvidia-smi", "--format=csv,noheader,nounits"]
    answers = together(
        {
            "gpus": lambda: ask([*listing, f"--query-gpu={_QUERY}"]),
            "capability": lambda: ask([*listing, "--query-gpu=compute_cap"]),  # drivers before R510 do not know it
        }
    )
    torch, cuda = _torch()
    gpus, fault = read({name: answer or Answer(1, "no answer") for name, answer in answers.items()})
    return GpuFacts(gpus, fault, os.environ.get("CUDA_VISIBLE_DEVICES"), torch, cuda)


def read(answers: Mapping[str, Answer]) -> tuple[tuple[Gpu, ...], str | None]:
    """(GPUs, fault) in what nvidia-smi said."""
    listing, capability = answers["gpus"], answers["capability"]
    if not listing.ok:
        return (), None if listing.status is None and "not found" in listing.text else listing.line
    rows = [[part.strip() for part in line.split(",")] for line in listing.text.splitlines() if line.count(",") == 4]
    capabilities = [_numbers(line) for line in capability.text.splitlines()] if capability.ok else []
    if len(capabilities) != len(rows):
        capabilities = [() for _ in rows]
    gpus = (
        Gpu(index, name, _numbers(driver), int(memory) if memory.isdigit() else 0, mig == "Enabled", capable or None)
        for (index, name, driver, memory, mig), capable in zip(rows, capabilities, strict=True)
    )
    return tuple(gpus), None


def judge(
    facts: GpuFacts, config: Config, engine: str, slurm_types: Mapping[str, int], inside_job: bool
) -> list[Finding]:
    """GPUs against what the stages want. `slurm_types`: the most GPUs of each type on a node that jobs may get."""
    local = config.cluster.executor == "local"
    needs = _image_needs(config, engine)
    findings = _here(facts, config, local, inside_job)
    if needs is not None:
        findings += _driver(facts, config, needs)
        if not local:
            findings += _types(slurm_types, config, needs)
    findings += _torch_build(facts, config, local)
    return findings


def _finding(level: Level, what: str, remedy: str = "") -> Finding:
    return Finding(TOPIC, level, what, remedy)


def _here(facts: GpuFacts, config: Config, local: bool, inside_job: bool) -> list[Finding]:
    if facts.fault:
        remedy = "run nvidia-smi; the driver may have to be loaded or updated"
        return [_finding("fail" if local else "warn", f"nvidia-smi lists no GPUs: {facts.fault}", remedy)]
    if not facts.gpus:
        if config.model.path == EMBEDDED:
            return [_finding("ok", "none here; the embedded model trains on CPUs")]
        if local:
            what = f"none here: {config.model.path} would train on CPUs"
            return [_finding("fail", what, "take --preset demo, or a cluster profile with GPUs")]
        if inside_job:
            return [
                _finding("warn", "none in this job", "look where jobs that ask for GPUs run: srun --gpus=1 nvidia-smi")
            ]
        return [_finding("ok", "none here, as on most login nodes; the jobs' nodes have them")]
    first, count = facts.gpus[0], len(facts.gpus)
    driver = ".".join(f"{part:02d}" for part in first.driver)
    what = f"{count} x {first.name}, {first.memory_mb // 1024} GiB each, driver {driver}"
    findings = [_finding("ok", what)]
    if any(gpu.mig for gpu in facts.gpus):
        what = "MIG is on: the GPUs are cut into parts, and a process sees one part only"
        findings.append(_finding("warn", what, "ask for whole GPUs for train; a part may do for the reward server"))
    if facts.visible is not None:
        shown = facts.visible or "(empty: none is visible)"
        level: Level = "ok" if facts.visible or not local else "warn"
        findings.append(_finding(level, f"CUDA_VISIBLE_DEVICES={shown}", "unset it to use the GPUs"))
    asked = 0 if local else config.cluster.resources("train").gpus
    if asked > count:
        what = f"{count} GPUs here, and the training's job asks for {asked} on each node"
        findings.append(
            _finding("warn", what, "is this one of the nodes that it will run on? cluster.stages.train.gpus")
        )
    if local and count == 1:
        findings.append(_finding("ok", "one GPU: reward server and training share it"))
    return findings


def _image_needs(config: Config, engine: str) -> Needs | None:
    release = release_of(config.sandbox.image) if engine in ("apptainer", "singularity", "docker") else None
    return needs_of(release) if release else None


def _image(config: Config) -> str:
    return f"sandbox.image {config.sandbox.image.rpartition('/')[2]}"


def _driver(facts: GpuFacts, config: Config, needs: Needs) -> list[Finding]:
    if not facts.gpus:
        return []
    first = facts.gpus[0]
    image, driver = _image(config), ".".join(map(str, first.driver))
    findings = []
    if not driver_fits(first.driver, first.name, needs):
        branches = ", ".join(f"{major}.{minor}" for major, minor in needs.branches)
        what = f"{image} (CUDA {needs.cuda}) needs driver {needs.driver[0]}, and this one is {driver}"
        remedy = f"update the driver (data centre GPUs: also {branches} or later of these), or take an older image"
        findings.append(_finding("fail", what, remedy))
    if first.capability is not None:
        findings += _capability(first.name, first.capability, image, needs)
    return findings or [_finding("ok", f"{image} runs with driver {driver}")]


def _types(types: Mapping[str, int], config: Config, needs: Needs) -> list[Finding]:
    """The image against the types of GPUs that Slurm names."""
    chosen = [name for name in types if config.cluster.gpu_type in (None, name)]
    known = [(name, capability_of_type(name)) for name in chosen]
    image = _image(config)
    return [found for name, capable in known if capable for found in _capability(name, capable, image, needs)]


def _capability(gpu: str, capability: Version, image: str, needs: Needs) -> list[Finding]:
    shown = ".".join(map(str, capability))
    if capability < needs.oldest:
        what = f"{image} no longer supports {gpu} (compute capability {shown}; from {'.'.join(map(str, needs.oldest))})"
        return [_finding("fail", what, "take an older image: before 25.02 for Pascal and Volta")]
    if capability > needs.newest:
        what = f"{image} does not know {gpu} (compute capability {shown}; up to {'.'.join(map(str, needs.newest))})"
        return [_finding("fail", what, "take a newer image: from 22.09 for Hopper and Ada, from 25.02 for Blackwell")]
    return []


def _torch_build(facts: GpuFacts, config: Config, local: bool) -> list[Finding]:
    if config.cluster.trainer_image:
        return [_finding("ok", "the stages' torch is the one in cluster.trainer_image: not looked at")]
    if facts.torch is None:
        return [_finding("fail", "torch is not installed", "install the project's requirements")]
    asked = any(config.cluster.resources(stage).gpus for stage in config.all) if not local else bool(facts.gpus)
    if facts.torch_cuda is None:
        if asked:
            what = f"torch {facts.torch} is a CPU build: the GPUs would lie idle"
            return [_finding("fail", what, "install the CUDA build of torch that suits the nodes' driver")]
        return [_finding("ok", f"torch {facts.torch} is a CPU build, which suits a machine without GPUs")]
    oldest = _TORCH_DRIVERS.get(int(facts.torch_cuda.split(".")[0]))
    if facts.gpus and oldest and facts.gpus[0].driver < oldest:
        driver = ".".join(map(str, facts.gpus[0].driver))
        what = (
            f"torch {facts.torch} (CUDA {facts.torch_cuda}) needs driver {oldest[0]} or later, and this one is {driver}"
        )
        return [_finding("fail", what, "install a torch built for an older CUDA, or update the driver")]
    return [_finding("ok", f"torch {facts.torch} is built for CUDA {facts.torch_cuda}")]


def _numbers(text: str) -> Version:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def _torch() -> tuple[str | None, str | None]:
    """torch's version and CUDA, from its files."""
    try:
        distribution = importlib.metadata.distribution("torch")
    except importlib.metadata.PackageNotFoundError:
        return None, None
    try:
        with open(str(distribution.locate_file("torch/version.py"))) as file:
            text = file.read()
    except OSError:
        return distribution.version, None
    match = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", text, re.MULTILINE)
    return distribution.version, match[1] if match else None
