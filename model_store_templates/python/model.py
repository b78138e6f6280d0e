"""The reward model as a Triton Python backend model. It runs inside tritonserver's stub process.

Inputs: input_ids INT32 (b, T), right-padded with anything; lengths INT32 (b, 1). Outputs: rewards FP32 (b, 1); and
model INT64 (b, 1), the beginning of the identity, so that a client knows which model gave the rewards.
With dynamic batching the rows of all waiting requests share forwards; without, each request is computed exactly as
it was sent, so that its rewards never depend on other clients.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

# Packages that were bound into the server's container come before its own. PYTHONPATH does not reach this process.
sys.path[:0] = [str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("HH_PIPELINE_PACKAGES")])]

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from scoring import RewardModel  # the copy beside this file


class TritonPythonModel:
    """Loads `reward_model/` beside this file and scores requests."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.merge_requests = "dynamic_batching" in config
        self.mark = int(parameters["identity"][:15], 16)
        if args["model_instance_kind"] == "GPU":
            if not torch.cuda.is_available():
                raise pb_utils.TritonModelException(
                    f"tritonserver has a GPU but its torch {torch.__version__} cannot use it; "
                    "install a CUDA build of torch for the server, or hide the GPU with CUDA_VISIBLE_DEVICES="
                )
            device = f"cuda:{args['model_instance_device_id']}"
        else:
            device = "cpu"
            torch.set_num_threads(int(parameters["num_threads"]))
        self.model = RewardModel(
            Path(__file__).resolve().parent / "reward_model",
            device,
            parameters["dtype"],
            max_length=int(parameters["max_length"]),
            max_batch_tokens=int(parameters["max_batch_tokens"]),
            max_batch_size=max(1, int(config["max_batch_size"])),
            attention=parameters["attention"],
        )
        self.model.warm_up()
        gc.freeze()  # what was imported lives until the end: collecting it would only slow the server's exit down

    def execute(self, requests: list[Any]) -> list[Any]:
        """Reply to every request: with its rewards, or with an error of its own. Never with an invented reward."""
        responses: list[Any] = [None] * len(requests)
        accepted: dict[int, list[list[int]]] = {}
        for index, request in enumerate(requests):
            try:
                accepted[index] = self._rows(request)
            except ValueError as error:
                responses[index] = _refuse(str(error), pb_utils.TritonError.INVALID_ARG)
        groups = [list(accepted)] if self.merge_requests and accepted else [[index] for index in accepted]
        for group in groups:
            for index, response in zip(group, self._score([accepted[index] for index in group]), strict=True):
                responses[index] = response
        return responses

    def _rows(self, request: Any) -> list[list[int]]:
        """The request's sequences without their padding; ValueError when they cannot be scored."""
        input_ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()  # (b, T)
        lengths = pb_utils.get_input_tensor_by_name(request, "lengths").as_numpy()  # (b, 1)
        if input_ids.ndim != 2 or lengths.shape != (input_ids.shape[0], 1):
            raise ValueError(f"input_ids {input_ids.shape} and lengths {lengths.shape} must be (b, T) and (b, 1)")
        counts = lengths[:, 0].tolist()
        if min(counts) < 1 or max(counts) > input_ids.shape[1]:
            raise ValueError(f"lengths must be within 1..{input_ids.shape[1]}, the width of input_ids")
        rows = [row[:count].tolist() for row, count in zip(input_ids, counts, strict=True)]
        self.model.validate(rows)
        return rows

    def _score(self, requests: list[list[list[int]]]) -> list[Any]:
        """One response for each request of a group that is computed together."""
        try:
            rewards = self.model.score([row for rows in requests for row in rows])
        except Exception as error:  # becomes its client's error; the server lives on
            if len(requests) > 1:  # it may be the fault of one
                return [response for rows in requests for response in self._score([rows])]
            pb_utils.Logger.log_error(f"scoring failed: {type(error).__name__}: {error}")
            message = f"scoring failed: {type(error).__name__}: {error}"
            return [_refuse(message, pb_utils.TritonError.INTERNAL)]
        responses = []
        for rows in requests:
            mine, rewards = rewards[: len(rows)], rewards[len(rows) :]
            if not all(math.isfinite(reward) for reward in mine):
                responses.append(_refuse("the model gave a reward that is not finite", pb_utils.TritonError.INTERNAL))
                continue
            tensor = pb_utils.Tensor("rewards", np.asarray(mine, dtype=np.float32).reshape(-1, 1))
            mark = pb_utils.Tensor("model", np.full((len(mine), 1), self.mark, dtype=np.int64))
            responses.append(pb_utils.InferenceResponse([tensor, mark]))
        return responses


def _refuse(message: str, code: int) -> Any:
    return pb_utils.InferenceResponse([], error=pb_utils.TritonError(message, code))
