"""How much a phase computes, which share of the devices' peak that is, and how much memory it takes."""

from __future__ import annotations

import math
import resource
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.training.last_layer import alone_in_last_layer
from pipeline.training.policy import Policy
from pipeline.training.ranks import Ranks

_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 150e12,
    "A6000": 155e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense 16-bit tensor-core FLOP/s by a part of the device's name, as NVIDIA's data sheets give them. More special names
come first."""


@dataclass(frozen=True)
class Arithmetic:
    """Weights that a token is multiplied by in each part of the models; embeddings are looked up and count nothing."""

    trunk: int
    top: int
    """Of the top, those that every token meets."""
    head: int
    """With those of the last layer that sampled tokens alone meet (`last_layer_at`)."""
    value: int
    """A value head, which meets sampled tokens."""
    critic: int
    """A critic of its own: what every token meets."""
    critic_last: int
    """What sampled tokens alone meet of it."""
    trained: int

    def phase(self, tokens: int, response: int, epochs: float) -> float:
        """FLOPs of a phase over `tokens` of prompts and responses, `response` of them sampled.

        Two a weight and token for a forward, two for the gradient of what enters and two for that of a trained weight
        (Kaplan et al. 2020, arXiv:2001.08361, section 2.1, without attention's own). Sampling passes the whole model,
        the old policy and the reference their tops, an epoch the top alone; sampled tokens meet head and value head.
        What a prompt meets in the last layer while it is read is not counted.
        """
        once = 2.0 * (self.top * tokens + self.head * response)
        values = 2.0 * ((self.value + self.critic_last) * response + self.critic * tokens)
        sample = 2.0 * self.trunk * tokens + once
        return sample + 2.0 * once + values + self.update(tokens, response, epochs)

    def update(self, tokens: int, response: int, epochs: float) -> float:
        """FLOPs of the epochs alone."""
        sampled = self.head + self.value + self.critic_last
        forward = 2.0 * ((self.top + self.critic) * tokens + sampled * response)
        whole = self.top + self.critic + sampled
        return epochs * forward * (2.0 + min(1.0, self.trained / max(1, whole)))


def arithmetic(trunk: nn.Module, policy: Policy) -> Arithmetic:
    """Counted from the modules."""
    parts = (policy.top.part, policy.top.head, policy.value, policy.critic)
    top, head, value, critic = map(_weights, parts)
    trained = sum(_weights(part, trained=True) for part in parts)
    last = sum(map(_weights, alone_in_last_layer(policy.top.part.body)))
    last_of_critic = sum(map(_weights, alone_in_last_layer(policy.critic.body))) if policy.critic else 0
    return Arithmetic(
        trunk=_weights(trunk),
        top=top - last,
        head=head + last,
        value=value,
        critic=critic - last_of_critic,
        critic_last=last_of_critic,
        trained=trained,
    )


def peak_flops(device: torch.device, given_tflops: float | None) -> float | None:
    """FLOP/s of a device at best: as given, else by its name; None where neither says."""
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


def memory_row(ranks: Ranks) -> dict[str, float]:
    """The most memory, in GiB, that a rank has held: on its device since the last call, and of the machine's ever."""
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row = {"memory/peak_rss_gib": rss}
    if ranks.device.type == "cuda":
        row["memory/peak_gpu_gib"] = torch.cuda.max_memory_allocated(ranks.device) / 2**30
        torch.cuda.reset_peak_memory_stats(ranks.device)
    everyone = ranks.gather(row)
    return {name: max(each[name] for each in everyone) for name in row}


def _weights(module: nn.Module | None, trained: bool = False) -> int:
    """Entries of the matrices, but for embeddings; also of those that ZeRO-3 has spread over the ranks."""
    if module is None:
        return 0
    looked_up = {id(each.weight) for each in module.modules() if isinstance(each, nn.Embedding)}
    shapes = [
        getattr(parameter, "ds_shape", parameter.shape)
        for parameter in module.parameters()
        if id(parameter) not in looked_up and (parameter.requires_grad or not trained)
    ]
    return sum(math.prod(shape) for shape in shapes if len(shape) >= 2)
