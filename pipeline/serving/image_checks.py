"""Whether an image can serve a model store: its server runs, and what the store's flavour needs is in it."""

from __future__ import annotations

import os
from typing import Any

from pipeline import procs
from pipeline.containers import packages
from pipeline.containers.command import exec_environment
from pipeline.containers.steps import last_line
from pipeline.errors import UserError

CHECK_S = 600.0
"""A .sif file that cannot be mounted is unpacked for each command: that takes minutes."""
PYTORCH_BACKEND = "/opt/tritonserver/backends/pytorch"


def check_image(inside: list[str], python: str | None) -> dict[str, Any]:
    """Run the image's server and Python once; returns their versions, and whether the server can close parts of its
    service (`closes`). UserError when they cannot serve.

    `python` is the minor version that packages were bound in for; None where the image brings its own.
    """
    env = exec_environment(os.environ, {})
    closes = _check_server(inside, env)
    version = "import sys; print('%d.%d' % sys.version_info[:2])"
    status, text = procs.capture([*inside, "python3", "-c", version], env=env, timeout_s=CHECK_S)
    found = text.split()[-1] if status == 0 and text.split() else ""
    if not found:
        raise UserError(f"sandbox.image: it has no python3 that runs: {last_line(text)}")
    if python is not None and found != python:
        raise UserError(f'sandbox.python: the image has Python {found}, not {python}; set sandbox.python="{found}"')
    path = f"import sys; sys.path.insert(0, {packages.IN_CONTAINER!r}); " if python is not None else ""
    status, text = procs.capture(
        [*inside, "python3", "-c", f"{path}import numpy, torch, transformers"], env=env, timeout_s=CHECK_S
    )
    if status != 0:
        remedy = "use sandbox.packages=trainer" if python is None else "take a newer image, or another sandbox.python"
        raise UserError(f"sandbox.image: its Python cannot import torch and transformers: {last_line(text)}; {remedy}")
    return {"python": found, "tritonserver": _server_version(inside, env), "closes": closes}


def check_backend(inside: list[str]) -> dict[str, Any]:
    """As `check_image`, of an image whose PyTorch backend serves graphs, without Python."""
    env = exec_environment(os.environ, {})
    closes = _check_server(inside, env)
    status, _ = procs.capture([*inside, "ls", PYTORCH_BACKEND], env=env, timeout_s=CHECK_S)
    if status != 0:
        raise UserError(
            f"sandbox.image: it has no PyTorch backend ({PYTORCH_BACKEND}), which serving.flavour=torchscript needs; "
            "take an image with it, as tritonserver:YY.MM-pyt-python-py3"
        )
    return {"python": "none", "tritonserver": _server_version(inside, env), "closes": closes}


def _check_server(inside: list[str], env: dict[str, str]) -> bool:
    """Run the image's server once; whether it can close what no client needs."""
    _, text = procs.capture([*inside, "tritonserver", "--help"], env=env, timeout_s=CHECK_S)
    if "--model-repository" not in text:  # asked for help, it exits with status 1
        fuse = "; take sandbox.format=sandbox, or sandbox.unpack_on_node=true" if "fuse" in text.lower() else ""
        raise UserError(f"sandbox.image: tritonserver does not run in it: {last_line(text)}{fuse}")
    return "--grpc-restricted-protocol" in text


def _server_version(inside: list[str], env: dict[str, str]) -> str:
    status, text = procs.capture([*inside, "printenv", "TRITON_SERVER_VERSION"], env=env, timeout_s=CHECK_S)
    return text.split()[-1] if status == 0 and text.split() else "unknown"
