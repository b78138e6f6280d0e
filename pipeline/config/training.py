"""What the methods share: the training loop, the optimiser, sampling, evaluation, and what comes out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    """AdamW, as in trlX's HH example."""

    lr: float = Field(8e-6, gt=0)
    """Learning rate; after the warm-up it follows `scheduler.name`."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of the running averages of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator of AdamW's update."""
    weight_decay: float = Field(1e-6, ge=0)
    """On all trained weights, decoupled from the gradient."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient is scaled down to this L2 norm where it is longer."""


class Scheduler(Section):
    """The learning rate over optimiser steps."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: as it is, or down to `final` at train.total_steps on a line or half a cosine."""
    final: float = Field(0.0, ge=0, le=1)
    """Where the rate ends, as a share of the peak."""
    warmup_steps: int = Field(0, ge=0)
    """Optimiser steps over which the rate rises linearly."""


class Train(Section):
    """The `train` stage's loop: PPO's or ILQL's."""

    method: Literal["ppo", "ilql"] = "ppo"
    """What the `train` stage trains by."""
    num_processes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """"auto": one process a device that the server leaves free; on a CPU, 2."""
    accelerate_config: str = Field("auto", min_length=1)
    """Name in pipeline/config/accelerate (ddp, ddp-cpu, zero2-bf16, zero2-fp16, zero3) or a file; "auto" chooses by
    device."""
    seq_length: int = Field(1024, ge=4)
    """Prompt and response tokens; prompts keep their last seq_length - max_new_tokens tokens."""
    batch_size: int = Field(4, ge=1)
    """Rollouts, or ILQL's answers, per process and optimiser step."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rollouts or answers per forward; None takes batch_size. Accumulation does not change the result."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Tokens per forward (ILQL's with padding); None counts rows only. Nor does this change the result."""
    total_steps: int = Field(10000, ge=1)
    """Optimiser steps."""
    eval_interval: int = Field(500, ge=1)
    """Optimiser steps between evaluations of the mean held-out reward."""
    eval_prompts: int = Field(280, ge=1)
    """Test prompts that such an evaluation samples answers to."""
    checkpoint_interval: int = Field(1000, ge=1)
    """Optimiser steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the latest checkpoints stay on disk."""
    save_best: bool = True
    """Keep the policy of the best held-out reward beside the last one."""
    log_rollouts: bool = True
    """Append each phase's rollouts, with text, reward and KL, to a JSONL file of the run."""
    peak_tflops: float | None = Field(None, gt=0)
    """What a device computes at best (TFLOP/s), for the metrics `mfu`; None takes what its maker says of its 16-bit
    arithmetic, and knows nothing of CPUs."""
    tracker: Literal["wandb", "tensorboard", "none"] = "wandb"
    """Where metrics go beside metrics.jsonl."""
    project_name: str = Field("hh-pipeline", min_length=1)
    """The tracker's project."""


class Generate(Section):
    """How responses are sampled."""

    max_new_tokens: int = Field(128, ge=1)
    """Tokens of the longest response."""
    temperature: float = Field(1.0, gt=0)
    """Logits are divided by this; below 1 the likely tokens get likelier."""
    top_k: int = Field(0, ge=0)
    """Sample from the so many likeliest tokens; 0 from all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the smallest set of likeliest tokens with this much probability."""
    stop_sequences: tuple[str, ...] = ("Human:", "human:", "Assistant:", "assistant:")
    """Texts that end a response; they are not part of what is scored."""


class Evaluate(Section):
    """The comparison of the start with what was trained on held-out prompts."""

    num_prompts: int = Field(280, ge=2)
    """Test prompts, the first of the split."""
    batch_size: int = Field(32, ge=1)
    """Prompts that are decoded together."""
    num_samples: int = Field(8, ge=0)
    """Side-by-side samples in the report."""


class Output(Section):
    """What becomes of a trained model."""

    push_to_hub: str | None = Field(None, min_length=1)
    """Hub repository (owner/name) that the finished policy (or SFT or reward model, where a run ends in that) is pushed
    to; None keeps it in the run directory."""
    private: bool = True
    """Whether such a repository, where it is made, is private."""


KEPT_APART = {"keep_checkpoints", "checkpoint_interval", "micro_batch_size", "micro_batch_tokens"}
"""Settings of a training that change how it is kept, and cut to the memory that there is, but not what it ends in: one
that ran out of memory goes on with other cuts."""
SHOWN_APART = {"tracker", "project_name", "log_rollouts", "peak_tflops"}
"""Those that change how it is shown."""
