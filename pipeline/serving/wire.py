"""What goes over the wire: TRITON_HOST, gRPC channels, and requests and replies of the reward model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from pipeline.errors import UserError

TLS_VARIABLE = "TRITON_TLS"
"""Names the folder with the certificates for TRITON_HOST, where its server asks for one."""
SERVER_NAME = "reward-server.hh-pipeline"
"""The name in the server's certificate. Clients expect it wherever the server runs: it moves between nodes."""
FORMS = "host:port/model or unix:/path/to/socket:port/model"

_ADDRESS = re.compile(r"(?P<url>(?:unix:/.+|[^/:\s\[\]]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5}))/(?P<model>[\w.-]+)")
_CHANNEL: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # gRPC would send even 127.0.0.1 through http_proxy
    ("grpc.use_local_subchannel_pool", 1),  # a new client connects anew, whatever another one's back-off says
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]


@dataclass(frozen=True)
class Address:
    """A served model: gRPC url and model name."""

    url: str
    model: str
    tls: str | None = None
    """Folder with ca.pem, client.pem and client.key, for a server that asks for a certificate."""

    def __str__(self) -> str:
        return f"{self.url}/{self.model}"


def parse_address(text: str, where: str = "TRITON_HOST", tls: str | None = None) -> Address:
    """Parse "host:port/model" or "unix:/path:port/model"; UserError naming the expected forms."""
    match = _ADDRESS.fullmatch(text.strip())
    if match is None or not 0 < int(match["port"]) < 65536:
        raise UserError(f"{where}={text}: not a reward server's address; expected {FORMS}")
    return Address(match["url"], match["model"], tls or None)


def open_client(address: Address) -> triton.InferenceServerClient:
    """A client with a channel of its own. Opening does not connect yet. Not to be shared across fork."""
    if address.tls is None:
        return triton.InferenceServerClient(address.url, channel_args=_CHANNEL)
    folder = Path(address.tls)
    missing = [name for name in ("ca.pem", "client.pem", "client.key") if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{TLS_VARIABLE}={folder}: has no {', '.join(missing)}; give the run's services/tls folder")
    return triton.InferenceServerClient(
        address.url,
        ssl=True,
        root_certificates=str(folder / "ca.pem"),
        private_key=str(folder / "client.key"),
        certificate_chain=str(folder / "client.pem"),
        channel_args=[*_CHANNEL, ("grpc.ssl_target_name_override", SERVER_NAME)],
    )


def served_parameters(client: triton.InferenceServerClient, model: str, timeout_s: float) -> dict[str, str]:
    """The parameters in the served model's configuration, with its "backend" and "max_batch_size".

    Its "identity" is missing where convert did not write it.
    """
    config = client.get_model_config(model, client_timeout=timeout_s).config
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    return {**parameters, "backend": config.backend, "max_batch_size": str(config.max_batch_size)}


def is_ready(client: triton.InferenceServerClient, model: str, timeout_s: float) -> bool:
    """Whether the model is loaded; False also while the server cannot be reached."""
    try:
        return bool(client.is_model_ready(model, client_timeout=timeout_s))
    except InferenceServerException:
        return False


def request_inputs(sequences: Sequence[Sequence[int]]) -> list[triton.InferInput]:
    """The tensors of one request: input_ids INT32 (b, T), zero-padded on the right, and lengths INT32 (b, 1)."""
    lengths = np.array([[len(sequence)] for sequence in sequences], dtype=np.int32)  # (b, 1)
    ids = np.zeros((len(sequences), int(lengths.max())), dtype=np.int32)  # (b, T)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    inputs = []
    for name, array in (("input_ids", ids), ("lengths", lengths)):
        tensor = triton.InferInput(name, list(array.shape), "INT32")
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def read_rewards(result: triton.InferResult, count: int) -> list[float]:
    """The rewards of a reply. UserError unless there is one finite FP32 value for each of `count` sequences."""
    array = result.as_numpy("rewards")
    if array is None or array.dtype != np.float32 or array.size != count:
        shape = None if array is None else (array.dtype, array.shape)
        raise UserError(
            f"the reward server replied {shape} to {count} sequences; it does not serve a model store of this project"
        )
    rewards = [float(value) for value in array.reshape(-1)]
    check_finite(rewards)
    return rewards


def check_finite(rewards: Sequence[float]) -> None:
    """Raise UserError when a reward is NaN or infinite: a reward is never made up."""
    for index, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise UserError(
                f"the reward of sequence {index} is {reward}; the reward model is damaged, or overflows: "
                "try serving.dtype=float32"
            )


@dataclass(frozen=True)
class Reply:
    """A request's rewards, and which model gave them."""

    rewards: list[float]
    mark: int | None
    """`mark_of` the model's identity; None of a graph, which cannot say it."""


def mark_of(identity: str | None) -> int | None:
    """What replies say of a model: the first 60 bits of its identity."""
    return int(identity[:15], 16) if identity else None


def ask(
    client: triton.InferenceServerClient, model: str, sequences: Sequence[Sequence[int]], timeout_s: float
) -> Reply:
    """Score one request's sequences and wait for the reply."""
    result = client.infer(model, request_inputs(sequences), client_timeout=timeout_s)
    marks = result.as_numpy("model")
    return Reply(read_rewards(result, len(sequences)), int(marks.flat[0]) if marks is not None else None)


def infer(
    client: triton.InferenceServerClient, model: str, sequences: Sequence[Sequence[int]], timeout_s: float
) -> list[float]:
    """The same, of whichever model answers."""
    return ask(client, model, sequences, timeout_s).rewards


def error_line(error: InferenceServerException) -> str:
    """Status and message on one line."""
    status = str(error.status() or "").removeprefix("StatusCode.")
    return " ".join(f"{status}: {error.message()}".split())
