"""The network: hub and registry, proxies, the interface between nodes, and Weights & Biases' key."""

from __future__ import annotations

import functools
import netrc
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.config.schema import Config
from pipeline.containers.login import is_true
from pipeline.containers.registry import parse_reference
from pipeline.errors import UserError
from pipeline.run.sources import EMBEDDED
from pipeline.site.ask import together
from pipeline.site.findings import Finding, Level

TOPIC = "Network"
_REQUEST_S = 4.0
_DEADLINE_S = 6.0
_OFFLINE = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True)
class NetworkFacts:
    """What could be reached from here."""

    reached: Mapping[str, str] = field(default_factory=dict)
    """Why an address could not be reached, by address; empty text: it answered."""
    hub: str = ""
    registry: str = ""
    """The addresses that were tried; empty: not needed."""
    interfaces: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
    """Names of the proxy variables that are set."""
    loopback_excepted: bool = True
    """Whether no_proxy names this machine itself."""
    hub_offline: bool = False
    wandb_key: bool = False
    wandb_mode: str = ""


def probe(config: Config, engine: str, environ: Mapping[str, str] = os.environ) -> NetworkFacts:
    """Try the addresses that the stages with internet need, with the profile's proxy where it names one."""
    from huggingface_hub import constants

    hub = constants.ENDPOINT if _needs_hub(config) else ""
    registry = registry_of(config.sandbox.image, environ) if engine in ("apptainer", "singularity", "docker") else ""
    tried = [address for address in (hub, registry) if address]
    answers = together({each: functools.partial(_reach, each, config.cluster.proxy) for each in tried}, _DEADLINE_S)
    excepted = (environ.get("no_proxy") or environ.get("NO_PROXY") or "").replace(" ", "").split(",")
    names = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
    return NetworkFacts(
        {each: f"no answer within {_DEADLINE_S:.0f} s" if why is None else why for each, why in answers.items()},
        hub,
        registry,
        tuple(name for _, name in socket.if_nameindex()),
        tuple(name for each in names for name in (each, each.upper()) if environ.get(name)),
        bool({"localhost", "127.0.0.1", "*"} & set(excepted)),
        environ.get("HF_HUB_OFFLINE", "").upper() in _OFFLINE,
        _has_wandb_key(environ),
        environ.get("WANDB_MODE", ""),
    )


def judge(facts: NetworkFacts, config: Config, prefetched: bool, inside_job: bool) -> list[Finding]:
    """What the stages with internet, and the nodes among themselves, will not reach."""
    findings = [_hub(facts, prefetched, inside_job)]
    if facts.registry:
        findings.append(_registry(facts, config, prefetched, inside_job))
    if facts.proxies:
        loopback = "" if facts.loopback_excepted else "; no_proxy leaves out 127.0.0.1: no harm, rewards ignore proxies"
        findings.append(_finding("ok", f"{', '.join(facts.proxies)} set here{loopback}"))
    if config.cluster.interface:
        findings.append(_interface(facts, config, config.cluster.interface, inside_job))
    if config.train.tracker == "wandb":
        findings.append(_wandb(facts))
    return findings


def registry_of(image: str, environ: Mapping[str, str] = os.environ) -> str:
    """The address of the registry that an image comes from; "" where it is a file, or no image's name."""
    if not image.startswith("docker://"):
        return ""
    try:
        host = parse_reference(image).host
    except UserError:  # said by `pipeline.site.named`
        return ""
    host = "registry-1.docker.io" if host == "docker.io" else host
    plain = any(is_true(environ.get(f"{prefix}_NOHTTPS", "")) for prefix in ("APPTAINER", "SINGULARITY"))
    return f"{'http' if plain else 'https'}://{host}/v2/"


def _finding(level: Level, what: str, remedy: str = "") -> Finding:
    return Finding(TOPIC, level, what, remedy)


def _hub(facts: NetworkFacts, prefetched: bool, inside_job: bool) -> Finding:
    if not facts.hub:
        return _finding("ok", "the hub is not needed: data and models are made on the spot, or folders")
    if facts.hub_offline:
        what = "HF_HUB_OFFLINE is set: prefetch takes what the hub's cache on this machine already holds"
        return _finding("warn", what, "unset it on the login node, where prefetch is to fetch something")
    why = facts.reached.get(facts.hub, "")
    if not why:
        return _finding("ok", f"{facts.hub} answers")
    what = f"{facts.hub} cannot be reached: {why}"
    if prefetched:
        return _finding("ok", f"{what}; prefetch is done, and nothing else needs it")
    remedy = (
        "run --stage prefetch where it can be reached, such as a login node; "
        "name a proxy (cluster.proxy) or a mirror (HF_ENDPOINT); or give folders (model.path, data.source)"
    )
    return _finding("warn" if inside_job else "fail", what, remedy)


def _registry(facts: NetworkFacts, config: Config, prefetched: bool, inside_job: bool) -> Finding:
    why = facts.reached.get(facts.registry, "")
    host = urlsplit(facts.registry).netloc
    if not why:
        return _finding("ok", f"the image's registry {host} answers")
    what = f"the registry {host} of {config.sandbox.image} cannot be reached: {why}"
    if prefetched:
        return _finding("ok", f"{what}; prefetch is done, and nothing else needs it")
    remedy = "run --stage prefetch where it can be, or set sandbox.image to a file that was fetched there"
    return _finding("warn" if inside_job else "fail", what, remedy)


def _interface(facts: NetworkFacts, config: Config, name: str, inside_job: bool) -> Finding:
    if name in facts.interfaces:
        return _finding("ok", f"cluster.interface: {name} is here")
    what = f"cluster.interface: this machine has no {name}; it has {', '.join(facts.interfaces)}"
    certain = inside_job or config.cluster.executor == "local"
    return _finding("fail" if certain else "warn", what, "look on a compute node: srun ip -brief address")


def _wandb(facts: NetworkFacts) -> Finding:
    if facts.wandb_mode in ("offline", "disabled", "dryrun"):
        return _finding("ok", f"Weights & Biases: WANDB_MODE={facts.wandb_mode}")
    if facts.wandb_key:
        return _finding("ok", "Weights & Biases: there is a key")
    what = "train.tracker: wandb, but there is no key for it (WANDB_API_KEY, or its entry in .netrc)"
    return _finding("warn", what, "run wandb login, or set train.tracker to tensorboard or none")


def _needs_hub(config: Config) -> bool:
    model = config.model.path != EMBEDDED and not os.path.isdir(config.model.path)
    data = config.data.source not in ("demo", "hh") and not os.path.isdir(config.data.source)
    checkpoints = (config.reward_model.checkpoint, config.reward_model.checkpoint_base)
    return model or data or any(name is not None and not os.path.isdir(name) for name in checkpoints)


def _reach(address: str, proxy: str | None) -> str:
    """Why the address does not answer; "" when it does, whatever it says."""
    handlers = [urllib.request.ProxyHandler({"http": proxy, "https": proxy})] if proxy else []
    opener = urllib.request.build_opener(*handlers)  # without one: the environment's proxies
    try:
        with opener.open(urllib.request.Request(address, method="HEAD"), timeout=_REQUEST_S):
            return ""
    except urllib.error.HTTPError as error:  # 401 is how a registry greets
        error.close()
        return f"a proxy wants a login ({error.code})" if error.code == 407 else ""
    except urllib.error.URLError as error:
        reason = error.reason
        return (reason.strerror if isinstance(reason, OSError) else None) or str(reason)
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__


def _has_wandb_key(environ: Mapping[str, str]) -> bool:
    """Whether a key is in the environment or in .netrc; it is not read."""
    if environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    path = Path(environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
