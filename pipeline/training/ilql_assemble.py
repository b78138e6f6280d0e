"""What ILQL trains: loaded, and prepared for the ranks at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.training import sharding
from pipeline.training.assemble import make_float32
from pipeline.training.distributed import compute_dtype, configure_deepspeed, may_fuse, shards_weights
from pipeline.training.ilql_heads import Heads
from pipeline.training.ilql_model import ILQLModule
from pipeline.training.models import disable_dropout, load_causal_lm
from pipeline.training.prompts import derive_seed
from pipeline.training.sharding import loads_weights
from pipeline.training.split import NoTrunk, Split, split_model


def repeat_on_cpu(accelerator: Accelerator) -> None:
    """Make a CPU's kernels repeatable bit for bit: gradients of rows that several tokens share are sums, too."""
    if accelerator.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid


def load_split(path: Path, config: Config, accelerator: Accelerator) -> Split:
    """The language model at `path` on this process's device, without dropout, split below what is trained.

    What is trained is float32, but for DeepSpeed; in mixed precision what is frozen has 16 bits. Under ZeRO-3 weights
    are rank 0's, and on the host, until `prepare`.
    """
    model = load_causal_lm(path, compute_dtype(accelerator), weights=loads_weights(accelerator))
    disable_dropout(model)
    if shards_weights(accelerator):
        sharding.buffers_to(model, accelerator.device)
    else:
        model.to(accelerator.device)
    split = split_model(model, config.model.num_layers_unfrozen)
    if split.tied and shards_weights(accelerator) and not isinstance(split.trunk, NoTrunk):
        raise UserError(
            "train.accelerate_config: ZeRO-3 would spread the head, which is the embedding below the frozen layers; "
            "take zero2-bf16, or model.num_layers_unfrozen = -1"
        )
    return make_float32(split, accelerator)


def make_module(split: Split, config: Config, accelerator: Accelerator) -> ILQLModule:
    """The module to train, its heads fresh from the run's seed."""
    seed = derive_seed(config.seed, "ilql heads")
    heads = Heads(split.hidden_size, split.vocab_size, config.ilql.two_qs, seed)
    return ILQLModule(split, heads.to(accelerator.device), config.ilql)


def prepare(module: ILQLModule, split: Split, config: Config, accelerator: Accelerator) -> tuple[Any, Any]:
    """Module and optimiser as accelerate wraps them; the targets stay float32."""
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=may_fuse(accelerator),
    )
    configure_deepspeed(accelerator, 1, settings.max_grad_norm)  # task.py says which backward pass is a step's last
    inside = set(module.parameters())
    trunk = [weight for weight in split.whole.parameters() if weight not in inside]
    return sharding.prepare(accelerator, module, optimizer, beside=trunk)
