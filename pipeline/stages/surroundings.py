"""What a stage's work finds in its environment because of the cluster: caches, proxy, and a hub that is off."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pipeline.config.cluster import Cluster

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""The hub is off, for each of its libraries and their older versions."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_COMPILED = {
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}
"""Caches of compiled code: many small files, and locks, which network file systems serve badly."""


def surroundings(cluster: Cluster, offline: bool, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables of a stage's work beyond `environ`, in which what is set already stays."""
    added = cache_variables(cluster, environ)
    if offline:
        added |= OFFLINE
        if not cluster.reaches_internet and not environ.get("WANDB_MODE"):
            added["WANDB_MODE"] = "offline"
    elif cluster.proxy:
        added |= proxy_variables(cluster.proxy, environ)
    if "SLURM_JOB_ID" in environ or cluster.executor == "allocation" or cluster.scratch:
        folder = node_folder(environ)
        added |= {name: str(folder / place) for name, place in _COMPILED.items() if not environ.get(name)}
    return added


def hub_home(cluster: Cluster, environ: Mapping[str, str]) -> Path | None:
    """The folder below `cluster.cache` that the hub's files belong in; None where the user chose another, or none."""
    chosen = any(named.get(name) for named in (environ, cluster.environment) for name in ("HF_HOME", "HF_HUB_CACHE"))
    return Path(cluster.cache) / "huggingface" if cluster.cache and not chosen else None


def cache_variables(cluster: Cluster, environ: Mapping[str, str]) -> dict[str, str]:
    """HF_HOME below `cluster.cache`. The user's token stays where `hf auth login` put it."""
    home = hub_home(cluster, environ)
    if home is None:
        return {}
    own = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "~")).expanduser() / ".cache")
    token = environ.get("HF_TOKEN_PATH") or str(own / "huggingface" / "token")
    return {"HF_HOME": str(home), "HF_TOKEN_PATH": token}


def proxy_variables(proxy: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The proxy in both spellings, since programs read one or the other, and loopback left out of it."""
    spared = [name.strip() for name in (environ.get("no_proxy") or environ.get("NO_PROXY") or "").split(",")]
    no_proxy = ",".join(dict.fromkeys([*filter(None, spared), *_LOOPBACK]))
    values = {"http_proxy": proxy, "https_proxy": proxy, "no_proxy": no_proxy}
    return values | {name.upper(): value for name, value in values.items()}


def node_folder(environ: Mapping[str, str]) -> Path:
    """A folder of the user's own on the node's disk, kept for later jobs there: below TMPDIR, else /tmp."""
    base = Path(environ.get("TMPDIR") or tempfile.gettempdir())
    folder = base / f"hh-pipeline-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or folder.is_symlink():  # compiled code is run: nobody else may have put it there
        return Path(tempfile.mkdtemp(prefix="hh-pipeline-", dir=base))
    return folder
