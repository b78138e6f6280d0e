"""Which GPUs this job sees, and which of them the server gets."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

from pipeline import procs


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


def split_devices(devices: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(training's, server's): the last visible GPU serves, whatever its number; a single GPU is shared."""
    if len(devices) <= 1:
        return devices, devices
    return devices[:-1], devices[-1:]
