"""What another user of a machine may try against a reward server: run as that user, with the attempts as JSON.

python tests/intruder.py '[["read", "/path"], ["score", "host:port", "/folder with certificates"], ...]'

Prints what came of each, as JSON: "done", or the kind of error.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from pipeline.serving import wire

MODEL = "reward-model"


def attempt(kind: str, target: str, *more: str) -> None:
    """Do one thing, or raise what keeps us from it."""
    path = Path(target)
    if kind == "read":
        path.read_bytes()
    elif kind == "list":
        os.listdir(path)
    elif kind == "write":
        with path.open("r+b"):
            pass
    elif kind == "create":
        path.write_bytes(b"")
    elif kind == "replace":
        path.rename(path.with_name(f"{path.name}.swapped"))
    elif kind == "connect":
        with socket.socket(socket.AF_UNIX) as end:
            end.connect(target)
    elif kind == "score":
        score(target, *more)
    else:
        raise ValueError(kind)


def score(url: str, tls: str = "", ca_alone: str = "") -> None:
    """Ask for a reward: in the clear, with a folder's certificates, or with none but the authority's to check by."""
    if ca_alone:
        name = [("grpc.ssl_target_name_override", wire.SERVER_NAME)]
        client = triton.InferenceServerClient(url, ssl=True, root_certificates=ca_alone, channel_args=name)
    else:
        client = wire.open_client(wire.Address(url, MODEL, tls or None))
    try:
        wire.infer(client, MODEL, [[1, 2, 3]], 10)
    finally:
        client.close()


def outcome(words: list[str]) -> str:
    """What came of an attempt."""
    try:
        attempt(*words)
    except InferenceServerException as error:
        return str(error.status()).removeprefix("StatusCode.")
    except OSError as error:
        return type(error).__name__
    return "done"


if __name__ == "__main__":
    attempts: list[Any] = json.loads(sys.argv[1])
    print(json.dumps([outcome(words) for words in attempts]))
