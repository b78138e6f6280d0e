"""The container engine: which one, whether an ordinary user can build and run images with it, and the image itself."""

from __future__ import annotations

import functools
import getpass
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.containers import advisories
from pipeline.containers.command import ENGINES, choose_engine
from pipeline.errors import UserError
from pipeline.serving import environment
from pipeline.site import images
from pipeline.site.ask import Answer, ask, together
from pipeline.site.findings import Finding, Level

TOPIC = "Reward server's engine"
_OLDEST = (1, 1)
"""Apptainer from which on an ordinary user builds from docker:// without setuid."""


@dataclass(frozen=True)
class EngineFacts:
    """What is installed, and what the kernel lets an ordinary user do."""

    versions: Mapping[str, Answer] = field(default_factory=dict)
    """What each engine on PATH said of its version."""
    docker: Answer | None = None
    """What docker's daemon said; None without docker."""
    user_namespaces: Answer | None = None
    """Whether one could be made (unshare), and what the kernel said."""
    restriction: str = ""
    """The kernel's setting that forbids them; empty: none is known."""
    setuid: tuple[str, ...] = ()
    """Engines with a setuid starter."""
    fuse: bool = False
    """Whether /dev/fuse can be opened, and squashfuse is there."""
    subuid: bool = False
    root: bool = False
    venv_fault: str | None = None
    """Why the environment of engine "venv" cannot be built here, or None."""
    libc: str = ""


def probe() -> EngineFacts:
    """Look for engines, and try a user namespace."""
    found = [name for name in ENGINES if shutil.which(name)]
    commands = {name: [name, "--version"] for name in found}
    commands["unshare"] = ["unshare", "--user", "--map-root-user", "true"]
    if "docker" in found:
        commands["daemon"] = ["docker", "info", "--format", "{{.ServerVersion}}"]
    answers = together({name: functools.partial(ask, argv) for name, argv in commands.items()})
    return EngineFacts(
        {name: answers[name] or Answer(None, "no answer") for name in found},
        answers.get("daemon"),
        answers["unshare"],
        _restriction(),
        tuple(name for name in found if name != "docker" and _has_setuid_starter(name)),
        os.access("/dev/fuse", os.R_OK | os.W_OK) and any(map(shutil.which, ("squashfuse_ll", "squashfuse"))),
        _has_subuid(),
        os.geteuid() == 0,
        _venv_fault(),
        os.confstr("CS_GNU_LIBC_VERSION") or "",
    )


def wanted(config: Config, facts: EngineFacts) -> str:
    """The engine that the `sandbox` stage will take here; what "auto" means is the profile's, or what is found."""
    if config.sandbox.engine != "auto":
        return config.sandbox.engine
    return choose_engine("auto", config.cluster.engine, lambda name: name if name in facts.versions else None)


def works(name: str, facts: EngineFacts) -> bool:
    """Whether the engine can be used here, as far as can be seen."""
    return not any(finding.level == "fail" for finding in _judge_one(name, facts))


def judge(facts: EngineFacts, config: Config, inside_job: bool = False) -> list[Finding]:
    """The engine that will be taken, and what it lacks."""
    name = wanted(config, facts)
    if name == "none":
        return [_finding("ok", "sandbox.engine: none: no server is started")]
    return [*_judge_choice(name, facts, config, inside_job), *_judge_release(name, config)]


def _judge_choice(name: str, facts: EngineFacts, config: Config, inside_job: bool) -> list[Finding]:
    if config.sandbox.engine != "auto":
        chosen = f"{name} (sandbox.engine)"
    else:
        chosen = f"{name} ({'cluster.engine' if config.cluster.engine else 'found by sandbox.engine: auto'})"
    findings = _judge_one(name, facts, chosen)
    if name == config.cluster.engine and name in ENGINES and name not in facts.versions:
        if config.cluster.executor == "slurm" and not inside_job:  # jobs may find it where the login node does not
            findings = [replace(findings[0], level="warn", remedy="see whether jobs find it: srun which " + name)]
    elif name in ("apptainer", "singularity") and _mounts_sif(config):
        findings += _judge_fuse(name, facts)
    others = [engine for engine in facts.versions if engine != name]
    if any(each.level == "fail" for each in findings):
        fine = [engine for engine in (*others, "venv") if engine != name and works(engine, facts)]
        if fine:
            findings.append(
                _finding("ok", f"this would work instead: {', '.join(fine)} (cluster.engine, sandbox.engine)")
            )
    elif others:
        findings.append(_finding("ok", f"also installed: {', '.join(others)}"))
    return findings


def version(text: str) -> tuple[int, ...]:
    """The first version number in what an engine says of itself."""
    match = re.search(r"\d+(\.\d+)+", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _finding(level: Level, what: str, remedy: str = "") -> Finding:
    return Finding(TOPIC, level, what, remedy)


def _judge_one(name: str, facts: EngineFacts, chosen: str = "") -> list[Finding]:
    chosen = chosen or name
    if name == "venv":
        return [_judge_venv(facts, chosen)]
    answer = facts.versions.get(name)
    if answer is None:
        remedy = "load its module (cluster.modules) or install it, or set another engine"
        return [_finding("fail", f"{chosen}: not on PATH here", remedy)]
    if not answer.ok:
        return [
            _finding("fail", f"{chosen}: does not run: {answer.line}", "mend the installation, or set another engine")
        ]
    if name == "docker":
        if facts.docker is None or not facts.docker.ok:
            said = facts.docker.line if facts.docker else "no answer"
            remedy = "start it, join its group, or set cluster.engine (sandbox.engine) to another engine"
            return [_finding("fail", f"{chosen}: its daemon cannot be used: {said}", remedy)]
        return [_finding("ok", f"{chosen}, daemon {facts.docker.line}")]
    return [_finding("ok", f"{chosen}: {answer.line}"), *_judge_privileges(name, answer, facts)]


def _judge_venv(facts: EngineFacts, chosen: str) -> Finding:
    if facts.venv_fault:
        return _finding("fail", f"{chosen}: {facts.venv_fault}", "mend that, or use a container engine")
    libc = version(facts.libc)
    if libc and libc < (2, 35):
        what = f"{chosen}: its server needs glibc 2.35, and this machine has {facts.libc}"
        return _finding("fail", what, "use a container engine")
    return _finding("ok", f"{chosen}: tritonserver in a virtual environment; Python and {facts.libc} suit it")


def _judge_release(name: str, config: Config) -> list[Finding]:
    """Known holes of the server that will be taken, as far as an image's name says which one it is."""
    if name == "venv":
        release = advisories.release_of(environment.SERVER_VERSION)
    else:
        release = images.release_of(config.sandbox.image)
    line = advisories.warning(release)
    return [_finding("warn", line, f"take an image of {advisories.text(advisories.FIXED)} or later")] if line else []


def _judge_privileges(name: str, answer: Answer, facts: EngineFacts) -> list[Finding]:
    """What an ordinary user needs to build and run images."""
    findings = []
    if name == "apptainer" and version(answer.text) < _OLDEST:
        what = f"{answer.line} is old: an ordinary user may not be able to build images"
        findings.append(_finding("warn", what, "ask the site for Apptainer 1.1 or later, or build the image elsewhere"))
    namespaces = facts.user_namespaces is not None and facts.user_namespaces.ok
    if namespaces:
        findings.append(_finding("ok", "user namespaces can be made: images are built and run without privileges"))
    elif name in facts.setuid:
        what = "no user namespaces; the setuid starter runs images, but building them may need --fakeroot rights"
        findings.append(_finding("warn", what, "if the sandbox stage fails, build the image where they are allowed"))
    else:
        reason = facts.user_namespaces.line if facts.user_namespaces else "no answer"
        what = f"an ordinary user can make no user namespace ({facts.restriction or reason})"
        if "apparmor" in facts.restriction:  # a profile may allow them to the engine alone: its own packages bring one
            remedy = f"try {name} exec IMAGE true; if it fails, ask for {name}'s AppArmor profile"
            findings.append(_finding("warn", what, remedy))
        else:
            remedy = "ask the site to allow them, or take sandbox.engine: venv"
            findings.append(_finding("fail", f"{what}, and there is no setuid starter", remedy))
    if not facts.subuid and not facts.root:
        what = "you have no entry in /etc/subuid: building works from docker:// and archives, not with every %post"
        findings.append(_finding("ok", what))
    return findings


def _mounts_sif(config: Config) -> bool:
    """Whether the server's image, or the trainer's, is a .sif file that is mounted to be run."""
    trainer = config.cluster.trainer_image
    packed = config.sandbox.format == "sif" and not config.sandbox.unpack_on_node
    return packed or (trainer is not None and trainer.endswith(".sif"))


def _judge_fuse(name: str, facts: EngineFacts) -> list[Finding]:
    """What mounting a .sif file takes where the engine has no privileges."""
    if facts.fuse or name in facts.setuid or name not in facts.versions:
        return []
    what = "no squashfuse, or no access to /dev/fuse: a .sif file is unpacked at every start, which takes minutes"
    return [_finding("warn", what, "set sandbox.format: sandbox, or ask for squashfuse and access to /dev/fuse")]


def _has_setuid_starter(name: str) -> bool:
    path = shutil.which(name)
    assert path is not None
    prefix = Path(os.path.realpath(path)).parents[1]
    folders = [prefix / "libexec" / name, prefix / "lib" / name, *Path("/usr/lib").glob(f"*-linux-gnu/{name}")]
    starters = [folder / "bin" / "starter-suid" for folder in folders]
    return any(starter.is_file() and starter.stat().st_mode & 0o4000 for starter in starters)


def _has_subuid() -> bool:
    try:
        lines = Path("/etc/subuid").read_text().splitlines()
    except OSError:
        return False
    return any(line.split(":")[0] in (getpass.getuser(), str(os.getuid())) for line in lines)


def _sysctl(name: str) -> str:
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:  # this kernel does not have it
        return ""


def _restriction() -> str:
    """The kernel's setting, and its value, that keeps ordinary users from making user namespaces."""
    forbidding = (
        ("user.max_user_namespaces", "0"),
        ("kernel.unprivileged_userns_clone", "0"),
        ("kernel.apparmor_restrict_unprivileged_userns", "1"),
    )
    found = [f"{name} = {value}" for name, value in forbidding if _sysctl(name.replace(".", "/", 1)) == value]
    return ", ".join(found)


def _venv_fault() -> str | None:
    try:
        environment.check_platform()
        environment.libpython_folder()
    except UserError as error:
        return str(error)
    return None
