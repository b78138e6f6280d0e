"""The processes that train together: a small set of collectives, the same with one process and with many."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor
from transformers.integrations import unset_hf_deepspeed_config

PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others: they may be scoring baselines, or waiting for a reward server to return."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among all; every method is to be called by every rank."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, on every rank, in `values`' dtype."""
        if self.world == 1:
            return values
        total = values.detach().clone().to(self.device)
        dist.all_reduce(total)
        return total.to(values.device)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; every rank gets the same answer."""
        return bool(self.sum(torch.tensor(int(flag), device=self.device)).item())

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return self.gather(value if self.first else None)[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)


def make_accelerator(accumulation: int, tracker: str | None = None, folder: Path | None = None) -> Accelerator:
    """The Accelerator of a PPO process: NCCL on GPUs, gloo on CPUs, DeepSpeed where the launcher's config says so."""
    on_cpu = not torch.cuda.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if deepspeed and on_cpu:
        _deepspeed_on_cpu()
    # What the launcher took from its config file would count for more than the argument below.
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if "RANK" in os.environ:  # else there is no launcher, and accelerate must not look for a process group
        handlers.append(InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=PATIENCE))
    accelerator = Accelerator(
        # With DeepSpeed accelerate must not be told of the CPU, or it forgets DeepSpeed.
        cpu=on_cpu and not deepspeed,
        gradient_accumulation_steps=accumulation,
        log_with=tracker,
        project_dir=folder,
        kwargs_handlers=handlers,
    )
    if deepspeed:
        # Else transformers would shard whatever is loaded from here on, under ZeRO-3; we shard what is trained.
        unset_hf_deepspeed_config()
    return accelerator


def _deepspeed_on_cpu() -> None:
    """Without a GPU, DeepSpeed is to use the CPU, and without its own reduction, which takes a compiler and which
    training does not use."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
