"""The models that PPO trains with: loaded, prepared for the ranks at hand, and saved."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn

from pipeline.config.schema import Config
from pipeline.training import sharding
from pipeline.training.adapters import add_adapters, shared_reference, whole_with_merged
from pipeline.training.critic import Critic
from pipeline.training.critic_warmup import parameter_groups
from pipeline.training.distributed import (
    compute_dtype,
    configure_deepspeed,
    may_fuse,
    shards_weights,
    uses_deepspeed,
    whole_weights,
)
from pipeline.training.models import disable_dropout, load_causal_lm, save_model
from pipeline.training.policy import Policy
from pipeline.training.prompts import derive_seed
from pipeline.training.split import Split, Top, alias_tree, frozen_reference, split_model

if TYPE_CHECKING:
    from pipeline.training.ranks import Ranks
    from pipeline.training.state import Data


def load_policy(path: Path, config: Config, accelerator: Accelerator) -> tuple[Split, Top]:
    """The causal language model at `path` on this process's device, without dropout, split; and its reference.

    The trained weights are float32, but for DeepSpeed, which makes float32 masters of its own. In mixed precision the
    frozen ones are bf16 (or fp16), and so is what they say.
    The reference is a frozen copy of the top. Under LoRA the top's own weights are frozen, and the reference is these;
    but weights that ZeRO-3 is to spread over the ranks are copied first.
    """
    model = load_causal_lm(path, compute_dtype(accelerator))
    disable_dropout(model)
    split = split_model(model.to(accelerator.device), config.model.num_layers_unfrozen)
    lora, sharded = config.model.lora, shards_weights(accelerator)
    if lora.rank and not sharded:
        reference = shared_reference(split.top)
        add_adapters(split.top, lora, derive_seed(config.seed, "lora"))
        return make_float32(split, accelerator), reference
    if not lora.rank:
        make_float32(split, accelerator)
    reference = frozen_reference(split, share=not sharded)
    add_adapters(split.top, lora, derive_seed(config.seed, "lora"))
    return make_float32(split, accelerator), reference


def make_float32(split: Split, accelerator: Accelerator) -> Split:
    """Turn what is trained to float32; not for DeepSpeed, which would turn it back."""
    for parameter in split.top.parameters():
        if parameter.requires_grad and not uses_deepspeed(accelerator):
            parameter.data = parameter.data.float()
    return split


def prepare(
    split: Split, reference: nn.Module, config: Config, accelerator: Accelerator, critic: Critic | None = None
) -> tuple[Any, Any]:
    """The trainable part and its optimiser, as accelerate wraps them.

    Under data parallelism the trained weights stay float32, and autocast rounds them as it rounds the reference's.
    DeepSpeed turns them to 16 bits and keeps float32 masters, so its reference must have 16 bits as well. What is
    wrapped is a twin of the top: the wrapper's hooks are not in the modules that sample.
    """
    seed = derive_seed(config.seed, "value head")
    policy = Policy(alias_tree(split.top), split.hidden_size, seed, critic).to(split.device)
    settings = config.optimizer
    values = policy.critic or policy.value
    assert values is not None
    values.requires_grad_(config.ppo.advantage == "gae")  # else there is nothing to train it by
    groups = parameter_groups(policy, values, (config.ppo.critic_lr or settings.lr) / settings.lr)
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=may_fuse(accelerator),
    )
    configure_deepspeed(accelerator, config.train.micro_batch_size or config.train.batch_size, settings.max_grad_norm)
    if uses_deepspeed(accelerator):
        reference.to(compute_dtype(accelerator))
    return sharding.prepare(accelerator, policy, optimizer)


def mean_baseline(data: Data) -> float:
    """The mean score of the data set's own answers where rewards are measured from them, else 0."""
    return statistics.fmean(data.train_baselines.values()) if data.train_baselines else 0.0


def save_policy(split: Split, tokenizer: Any, folder: Path, accelerator: Accelerator, ranks: Ranks) -> None:
    """Write the whole model, which the trained top is a part of, as safetensors in one dtype, with its tokenizer.

    Adapters are merged in what is written, and stay as they are here. To be called by every rank: ZeRO-3 gathers.
    """
    with whole_weights(accelerator, split.top)():
        if ranks.first:
            save_model(whole_with_merged(split, compute_dtype(accelerator)), tokenizer, folder)
        ranks.barrier()
