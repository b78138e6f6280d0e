"""Which GPUs this job sees, and which of them the server gets."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence

from pipeline import procs
from pipeline.config.cluster import Cluster
from pipeline.errors import UserError

_NAMES = re.compile(r"^(?:GPU (\d+):|\s+MIG ).*\(UUID: ([^)]+)\)", re.MULTILINE)
"""Index and UUID of a GPU, and the UUID of a part of one, as `nvidia-smi -L` lists them."""


def visible_devices(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The job's GPUs, as CUDA_VISIBLE_DEVICES lists them (indices, UUIDs or MIG names); all of the node without it."""
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        names = [name.strip() for name in listed.split(",")]
        # CUDA ignores what follows the first invalid entry; "NoDevFiles" and -1 are how sites say "none".
        valid = []
        for name in names:
            if not (name.isdigit() or name.startswith(("GPU-", "MIG-"))):
                break
            valid.append(name)
        return tuple(valid)
    if shutil.which("nvidia-smi") is None:
        return ()
    status, text = procs.capture(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"])
    return tuple(text.split()) if status == 0 else ()


def named_devices(listed: str, field: str) -> tuple[str, ...]:
    """The GPUs that a person lists; an empty list is the CPU. UserError, naming `field`, for what is not here."""
    names = tuple(name.strip() for name in listed.split(",")) if listed.strip() else ()
    if not names:
        return ()
    if shutil.which("nvidia-smi") is None:
        raise UserError(f"{field}: {listed}: this machine shows no GPU (there is no nvidia-smi); leave it out")
    status, text = procs.capture(["nvidia-smi", "-L"])
    here = _NAMES.findall(text) if status == 0 else []
    known = [*(index for index, _ in here if index), *(uuid for _, uuid in here)]
    for name in names:
        # As CUDA has it, the beginning of a UUID will do.
        if name not in known and not (name.startswith(("GPU-", "MIG-")) and any(one.startswith(name) for one in known)):
            raise UserError(f"{field}: no GPU here is called {name!r}; there are: {', '.join(known) or 'none'}")
    return names


def granted_devices(
    cluster: Cluster, stages: Sequence[str], environ: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """The GPUs of a job with these stages. UserError where the node shows fewer than the job asked Slurm for.

    Work that was planned for eight GPUs must not begin on CPUs because a driver or a site's prolog failed.
    """
    devices = visible_devices(environ)
    asked = {stage: cluster.resources(stage).gpus for stage in stages if cluster.executor == "slurm"}
    stage = max(asked, key=lambda name: asked[name], default=None)
    if stage is None or len(devices) >= asked[stage]:
        return devices
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    shown = f"CUDA_VISIBLE_DEVICES is {listed!r}" if listed is not None else "nvidia-smi lists no more"
    raise UserError(
        f"{environ.get('SLURMD_NODENAME') or os.uname().nodename}: {len(devices)} GPUs visible, {asked[stage]} asked "
        f"for ({shown}); leave the node out (cluster.exclude), or correct gpus of {stage} in profile {cluster.name}"
    )


def split_devices(devices: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(training's, server's): the last visible GPU serves, whatever its number; a single GPU is shared."""
    if len(devices) <= 1:
        return devices, devices
    return devices[:-1], devices[-1:]
