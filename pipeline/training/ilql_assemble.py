"""What ILQL trains: loaded, and prepared for the ranks at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.training.distributed import compute_dtype, configure_deepspeed, shards_weights
from pipeline.training.ilql_heads import Heads
from pipeline.training.ilql_model import ILQLModule
from pipeline.training.models import disable_dropout, load_causal_lm
from pipeline.training.prompts import derive_seed
from pipeline.training.split import Split, split_model


def refuse_sharded_weights(accelerator: Accelerator) -> None:
    """Under ZeRO-3 no rank holds the heads that decoding and synchronisation need whole."""
    if shards_weights(accelerator):
        raise UserError("train.accelerate_config: ILQL does not train under ZeRO-3; take zero2-bf16 or ddp")


def repeat_on_cpu(accelerator: Accelerator) -> None:
    """Make a CPU's kernels repeatable bit for bit: gradients of rows that several tokens share are sums, too."""
    if accelerator.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid


def load_split(path: Path, config: Config, accelerator: Accelerator) -> Split:
    """The language model at `path` on this process's device, without dropout, split below what is trained.

    What is trained is float32; in mixed precision what is frozen has 16 bits.
    """
    model = load_causal_lm(path, compute_dtype(accelerator))
    disable_dropout(model)
    split = split_model(model.to(accelerator.device), config.model.num_layers_unfrozen)
    for parameter in split.top.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return split


def make_module(split: Split, config: Config) -> ILQLModule:
    """The module to train, its heads fresh from the run's seed."""
    seed = derive_seed(config.seed, "ilql heads")
    heads = Heads(split.hidden_size, split.vocab_size, config.ilql.two_qs, seed)
    return ILQLModule(split, heads, config.ilql).to(split.device)


def prepare(module: ILQLModule, config: Config, accelerator: Accelerator) -> tuple[Any, Any]:
    """Module and optimiser as accelerate wraps them; the targets stay float32."""
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    configure_deepspeed(accelerator, 1, settings.max_grad_norm)  # task.py says which backward pass is a step's last
    wrapped, prepared = accelerator.prepare(module, optimizer)
    module.targets.widen()
    return wrapped, prepared
