"""What serves rewards: the sandbox that tritonserver runs in, the model store, the server and its clients."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.section import Section


class Sandbox(Section):
    """The container or environment that holds tritonserver."""

    engine: Literal["auto", "venv", "singularity", "apptainer", "docker", "none"] = "auto"
    """"auto" takes apptainer, singularity or docker where found, else venv; "none" starts no server."""
    image: str = Field("docker://nvcr.io/nvidia/tritonserver:26.08-py3", min_length=1)
    """What a container engine takes: docker://host/name:tag, oci-archive:FILE, docker-archive:FILE, a .sif or .def
    file, or a sandbox folder; the engine "venv" has no use for it."""
    format: Literal["sif", "sandbox"] = "sif"
    """One .sif file, or a sandbox folder: many thousand files, for local disks or engines that cannot mount a .sif."""
    unpack_on_node: bool = False
    """Unpack the image into cluster.scratch of the server's node before the server starts, and remove it afterwards."""
    packages: Literal["trainer", "image"] = "trainer"
    """Where the server's torch and transformers come from: the trainer's versions, bound into the container, or the
    image's own."""
    python: str = Field("3.12", pattern=r"^3\.\d+$")
    """The minor version of the image's Python, for which the packages are fetched."""
    cache_dir: str | None = Field(None, min_length=1)
    """Where images and environments are kept for all runs; default hh-pipeline in cluster.cache, or in ~/.cache."""


class Serving(Section):
    """The Triton model store and the server."""

    model_name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The model's name in Triton; default: the checkpoint's last path component, or "reward-model"."""
    flavour: Literal["python", "torchscript"] = "python"
    """What the store is written for: Triton's Python backend, or its PyTorch backend, which needs no Python."""
    attention: Literal["auto", "flash_attention_2", "sdpa"] = "auto"
    """Attention of the flavour python: the package flash_attn, or torch's own; "auto" takes the first where it can."""
    bind: Literal["auto", "unix", "loopback", "network"] = "auto"
    """A socket in a 0700 folder, or TCP with mutual TLS: on 127.0.0.1 or to other nodes; "auto" by placement."""
    grpc_port: int = Field(0, ge=0, le=65535)
    """0 takes a free port; another port must be free."""
    dynamic_batching: bool = True
    """Merge concurrent requests, with the flavour python. Off, a request's rewards do not depend on who else asks:
    bit-for-bit repeatable."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the served weights and their arithmetic; rewards are always float32."""
    max_length: int = Field(1024, ge=4)
    """Tokens of the longest sequence that is scored; longer ones lose their beginning."""
    max_batch_tokens: int = Field(8192, ge=16)
    """Tokens that one forward of the reward model, and one request, may hold."""
    max_batch_size: int = Field(64, ge=1)
    """Sequences that one request, and one forward, may hold."""
    num_threads: int = Field(1, ge=1)
    """CPU threads of the served model where there is no GPU."""
    parity_tolerance: float = Field(1e-4, gt=0)
    """The largest difference from the eager model that conversion accepts (absolute, in reward units)."""
    start_timeout_s: float = Field(900.0, gt=0)
    """Seconds that the server may take to load its model and become ready."""
    request_timeout_s: float = Field(120.0, gt=0)
    """Seconds that the server may take over one request."""
    retry_timeout_s: float = Field(300.0, ge=0)
    """Seconds that clients go on trying to reach a server that went away, before the stage fails."""
    max_in_flight: int = Field(4, ge=1)
    """Requests that each training process keeps under way at once."""
    baseline_cache: str | None = Field(None, min_length=1)
    """Folder for the scores of the data's own answers, which runs may share; default: the run's own cache folder."""
