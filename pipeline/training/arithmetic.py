"""How much a phase computes, which share of the devices' peak that is, and how much memory it takes."""

from __future__ import annotations

import resource
from dataclasses import dataclass

import torch
from torch import nn

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
    head: int
    extra: int
    """What the policy holds beside top and head: its value function, and adapters."""
    trained: int

    def phase(self, tokens: int, response: int, epochs: float) -> float:
        """FLOPs of a phase over `tokens` of prompts and responses, `response` of them sampled.

        Two a weight and token for a forward, two for the gradient of what enters and two for that of a trained weight
        (Kaplan et al. 2020, arXiv:2001.08361, section 2.1, without attention's own). Sampling passes the whole model,
        the old policy and the reference their tops, an epoch the top alone; only sampled tokens meet head and value.
        """
        once = 2.0 * (self.top * tokens + self.head * response)
        value = 2.0 * self.extra * response
        sample = 2.0 * self.trunk * tokens + once
        return sample + 2.0 * once + value + self.update(tokens, response, epochs)

    def update(self, tokens: int, response: int, epochs: float) -> float:
        """FLOPs of the epochs alone."""
        forward = 2.0 * (self.top * tokens + (self.head + self.extra) * response)
        whole = self.top + self.head + self.extra
        return epochs * forward * (2.0 + min(1.0, self.trained / max(1, whole)))


def arithmetic(trunk: nn.Module, top: nn.Module, head: nn.Module, policy: nn.Module) -> Arithmetic:
    """Counted from the modules; `policy` holds top and head."""
    sizes = [_weights(part) for part in (trunk, top, head, policy)]
    trained = _weights(policy, trained=True)
    return Arithmetic(sizes[0], sizes[1], sizes[2], max(0, sizes[3] - sizes[1] - sizes[2]), trained)


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


def _weights(module: nn.Module, trained: bool = False) -> int:
    """Entries of the matrices, but for embeddings."""
    looked_up = {id(each.weight) for each in module.modules() if isinstance(each, nn.Embedding)}
    return sum(
        parameter.numel()
        for parameter in module.parameters()
        if parameter.ndim >= 2 and id(parameter) not in looked_up and (parameter.requires_grad or not trained)
    )
