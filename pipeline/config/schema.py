"""The typed, strict configuration. Unknown keys are errors; `pipeline.config.load` words them.

Names follow trlX where its users know them (CONFIG_NAME presets, train.*, method hyper-parameters as ppo.*).
Only what a stage lists in its fingerprint makes it run again; see `pipeline.stages`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config.cluster import Cluster
from pipeline.config.section import Section, Text
from pipeline.config.serving import Sandbox, Serving
from pipeline.stages.names import STAGES, StageName


class EmbeddedModel(Section):
    """The size of the model that is made on the spot when `model.path` is "embedded" (a random GPT-NeoX)."""

    vocab_size: int = Field(1024, ge=300)
    """Tokens, of a byte-level BPE that is trained on the training texts."""
    hidden_size: int = Field(256, ge=8)
    """Width of the hidden states; a multiple of num_heads."""
    num_layers: int = Field(4, ge=2)
    """Transformer layers."""
    num_heads: int = Field(4, ge=1)
    """Attention heads a layer."""
    max_positions: int = Field(256, ge=16)
    """The longest sequence, in tokens."""


class Model(Section):
    """The causal language model that everything starts from."""

    path: str = Field("EleutherAI/gpt-j-6B", min_length=1)
    """A hub id, a folder, or "embedded" for a small model that is made on the spot."""
    revision: str | None = Field(None, min_length=1)
    """Branch, tag or commit of a hub id; None takes its main branch."""
    tokenizer_path: str | None = Field(None, min_length=1)
    """A hub id or folder; by default the model's own."""
    num_layers_unfrozen: int = 2
    """Layers that PPO trains, counted from the top: at least 1, and fewer than the model has."""
    embedded: EmbeddedModel = EmbeddedModel()


class DemoData(Section):
    """How many dialogues the project generates by itself when `data.source` is "demo"."""

    train: int = Field(2400, ge=8)
    """Training pairs."""
    test: int = Field(300, ge=4)
    """Test pairs, on prompts that no training pair has."""


class Data(Section):
    """Preference data in HH's format: rows with `chosen` and `rejected` dialogues, or prompt + chosen + rejected."""

    source: str = Field("Dahoas/rm-static", min_length=1)
    """"demo", a folder with train.jsonl[.gz] and test.jsonl[.gz], "hh" (the folder in HH_DATA), or a hub data set."""
    revision: str | None = Field(None, min_length=1)
    """Branch, tag or commit of a hub data set; None takes its main branch."""
    subsets: tuple[Text, ...] = ()
    """Folders of Anthropic/hh-rlhf (helpful-base, harmless-base, ...); empty takes the default."""
    limit_train: int | None = Field(None, ge=1)
    """Use the first so many training pairs; None uses all."""
    limit_test: int | None = Field(None, ge=1)
    """Use the first so many test pairs; None uses all."""
    demo: DemoData = DemoData()


class Supervised(Section):
    """What SFT and reward-model training have in common. Batches and rates are global, not per process."""

    num_processes: int = Field(1, ge=1)
    """Data-parallel processes; where there are GPUs, one GPU each."""
    epochs: int = Field(1, ge=1)
    """Passes over the training data."""
    batch_size: int = Field(16, ge=1)
    """Dialogues (for a reward model: pairs) per optimiser step, of all processes together."""
    lr: float = Field(1e-5, gt=0)
    """Peak learning rate: after the warm-up it falls along half a cosine to a tenth."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay on matrices; biases and norms have none."""
    warmup_steps: int = Field(0, ge=0)
    """Optimiser steps over which the learning rate rises linearly."""
    max_length: int = Field(1024, ge=4)
    """Tokens of prompt and response together; a longer dialogue loses the beginning of its prompt."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Arithmetic of forward and backward passes; weights and optimiser stay float32."""


class SFT(Supervised):
    """Supervised fine-tuning on the chosen responses."""

    loss_on: Literal["response", "dialogue"] = "response"
    """Which tokens are trained: the last answer's, or the whole dialogue's."""


class RewardModel(Supervised):
    """The reward model: trained by this run, or a checkpoint that exists."""

    checkpoint: str | None = Field(None, min_length=1)
    """A folder or hub id: a one-label sequence classification model, or trlX's layout (`transformer.*` and `v_head`);
    None takes the one that this run trains."""
    revision: str | None = Field(None, min_length=1)
    """Branch, tag or commit (also abbreviated) of a hub id; None takes its main branch."""
    checkpoint_base: str | None = Field(None, min_length=1)
    """A folder or hub id: the model that the checkpoint was trained from, for a checkpoint without config.json or
    tokenizer."""
    checkpoint_base_revision: str | None = Field(None, min_length=1)
    """As `revision`, of `checkpoint_base`."""
    base: Literal["sft", "model"] = "sft"
    """What training starts from: the SFT model or the base model."""


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
    """After the warm-up: as it is, or down to 0 at train.total_steps on a line or half a cosine."""
    warmup_steps: int = Field(0, ge=0)
    """Optimiser steps over which the rate rises linearly."""


class Train(Section):
    """The PPO training loop."""

    num_processes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """"auto": one process a device that the server leaves free; on a CPU, 2."""
    accelerate_config: str = Field("auto", min_length=1)
    """Name in pipeline/config/accelerate (ddp, ddp-cpu, zero2-bf16) or a file; "auto" chooses by device."""
    seq_length: int = Field(1024, ge=4)
    """Prompt and response tokens; prompts keep their last seq_length - max_new_tokens tokens."""
    batch_size: int = Field(4, ge=1)
    """Rollouts per process and optimiser step."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rollouts per forward; None takes batch_size. Accumulation does not change the result."""
    total_steps: int = Field(10000, ge=1)
    """Optimiser steps."""
    eval_interval: int = Field(500, ge=1)
    """Optimiser steps between evaluations of the mean held-out reward."""
    eval_prompts: int = Field(280, ge=1)
    """Test prompts that such an evaluation samples answers to."""
    checkpoint_interval: int = Field(1000, ge=1)
    """Optimiser steps between checkpoints; a checkpoint is written at the end of a rollout phase."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the latest checkpoints stay on disk."""
    tracker: Literal["wandb", "tensorboard", "none"] = "wandb"
    """Where metrics go beside metrics.jsonl."""
    project_name: str = Field("hh-pipeline", min_length=1)
    """The tracker's project."""


class PPO(Section):
    """PPO's hyper-parameters under trlX's names (there `method.*`)."""

    ppo_epochs: int = Field(4, ge=1)
    """Passes over a phase's rollouts."""
    num_rollouts: int = Field(64, ge=1)
    """Rollouts per process and phase."""
    chunk_size: int = Field(16, ge=1)
    """Prompts that are decoded together, per process."""
    init_kl_coef: float = Field(0.05, ge=0)
    """First coefficient of the KL penalty, in scaled reward per nat."""
    target: float | None = Field(6.0, gt=0)
    """Target KL (nats per response) of the adaptive controller; None fixes the coefficient."""
    horizon: int = Field(10000, ge=1)
    """Rollouts, of all processes, in which the coefficient changes by about a fifth at most; fewer adapt faster."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount of later rewards, per token."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE's lambda: 0 trusts the value function alone, 1 the rewards alone."""
    cliprange: float = Field(0.2, gt=0)
    """The policy's ratio to the sampling policy is clipped to 1 - this .. 1 + this."""
    cliprange_value: float = Field(0.2, gt=0)
    """How far (in scaled reward units) a value may move from the sampling one's before its loss is clipped."""
    vf_coef: float = Field(1.0, ge=0)
    """Weight of the value loss beside the policy loss."""
    scale_reward: Literal["running", "ref", "none"] = "running"
    """Divide scores by their running standard deviation, by ref_std, or not at all."""
    ref_std: float | None = Field(None, gt=0)
    """The standard deviation that "ref" divides by, in reward units."""
    cliprange_reward: float = Field(10.0, gt=0)
    """Scores (their deltas, with delta_reward) are clipped to plus or minus this before they are scaled."""
    delta_reward: bool = True
    """Subtract the reward of the data set's own answer to the same prompt."""


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
    """The comparison of the SFT start with the trained policy on held-out prompts."""

    num_prompts: int = Field(280, ge=2)
    """Test prompts, the first of the split."""
    batch_size: int = Field(32, ge=1)
    """Prompts that are decoded together."""
    num_samples: int = Field(8, ge=0)
    """Side-by-side samples in the report."""


class Config(Section):
    """A run's whole configuration, as runs/<name>/config.yaml holds it."""

    preset: str = Field("custom", min_length=1)
    """The preset that the configuration started from."""
    description: str = ""
    """What the preset is, for people."""
    seed: int = Field(1000, ge=0)
    """Seed of demo data, initial weights, the order of batches, and sampling."""
    all: tuple[StageName, ...] = STAGES
    """The stages that `--stage all` stands for, in order."""
    model: Model = Model()
    data: Data = Data()
    sft: SFT = SFT()
    reward_model: RewardModel = RewardModel()
    sandbox: Sandbox = Sandbox()
    serving: Serving = Serving()
    train: Train = Train()
    ppo: PPO = PPO()
    generate: Generate = Generate()
    optimizer: Optimizer = Optimizer()
    scheduler: Scheduler = Scheduler()
    evaluate: Evaluate = Evaluate()
    cluster: Cluster = Cluster()

    @property
    def prompt_length(self) -> int:
        """The most prompt tokens that fit beside a full response."""
        return self.train.seq_length - self.generate.max_new_tokens

    @model_validator(mode="after")
    def _sizes_fit(self) -> Config:
        from pipeline.config.checks import check_sizes

        check_sizes(self)
        return self

    def plain(self) -> dict[str, Any]:
        """The configuration as plain JSON types."""
        return self.model_dump(mode="json")
