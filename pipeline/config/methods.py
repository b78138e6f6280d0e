"""The training methods' settings: SFT, reward models, PPO and ILQL, under trlX's names where its users know them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class Supervised(Section):
    """What SFT and reward-model training have in common. Batches and rates are global, not per process."""

    num_processes: int = Field(1, ge=1)
    """Data-parallel processes; where there are GPUs, one GPU each."""
    epochs: int = Field(1, ge=1)
    """Passes over the training data."""
    batch_size: int = Field(16, ge=1)
    """Dialogues (for a reward model: pairs) per optimiser step, of all processes together."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps after which training ends, if the epochs have more; None takes all."""
    lr: float = Field(1e-5, gt=0)
    """Peak learning rate."""
    scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """After the warm-up: as it is, or down to a tenth of the peak on a line or half a cosine."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of AdamW's running averages of the gradient and of its square."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay on matrices; biases and norms have none."""
    warmup_steps: int = Field(0, ge=0)
    """Optimiser steps over which the learning rate rises linearly."""
    max_length: int = Field(1024, ge=4)
    """Tokens of prompt and response together; a longer dialogue loses the beginning of its prompt."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Arithmetic of forward and backward passes; weights and optimiser stay float32."""
    accelerate_config: str = Field("auto", min_length=1)
    """Name in pipeline/config/accelerate or a file; "auto" is data parallel."""
    frozen_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the layers, from the bottom and with the embeddings, that stays as it is."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Padded tokens per forward; larger batches are accumulated, which does not change the result."""
    eval_interval: int | None = Field(None, ge=1)
    """Optimiser steps between evaluations on the test rows; None evaluates at the end only."""
    checkpoint_interval: int = Field(1000, ge=1)
    """Optimiser steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the latest checkpoints stay on disk."""
    save_best: bool = False
    """Keep the model of the lowest held-out loss beside the last one, and let all that reads the stage's model take
    that; needs eval_interval."""


class SFT(Supervised):
    """Supervised fine-tuning on the chosen responses."""

    loss_on: Literal["response", "dialogue"] = "response"
    """Which tokens are trained: the last answer's, or the whole dialogue's."""
    append_eos: bool = True
    """Whether an answer ends with EOS; without it the model never learns to stop."""
    shuffle: bool = True
    """Whether each epoch has an order of its own; without, it is the data's."""
    packing: bool = False
    """Put several dialogues into one row, each blind to the others: no padding, the same losses."""


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
    max_length: int = Field(1024, ge=4)
    """Tokens of a pair's prompt and longer answer together; a longer prompt loses its beginning, and a pair of which an
    answer would be cut, or no prompt be left, is dropped: their rewards would be those of other texts."""
    base: Literal["sft", "model"] = "sft"
    """What training starts from: the SFT model or the base model."""
    center: float = Field(0.0, ge=0)
    """Weight of (r(chosen) + r(rejected))^2 in the loss, which keeps rewards near 0 (Eisenstein et al. 2023,
    arXiv:2312.09244)."""


class PPO(Section):
    """PPO's hyper-parameters under trlX's names (there `method.*`)."""

    ppo_epochs: int = Field(4, ge=1)
    """Passes over a phase's rollouts."""
    num_rollouts: int = Field(64, ge=1)
    """Rollouts per process and phase."""
    chunk_size: int = Field(16, ge=1)
    """Rollouts that are decoded side by side, per process; where one ends, the next prompt takes its place."""
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
    cliprange_reward: float | None = Field(10.0, gt=0)
    """Scores (their deltas, with delta_reward) are clipped to plus or minus this before they are scaled; None clips
    nothing."""
    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    """How advantages are estimated: by a value function, or from the other answers to the same prompt (RLOO,
    arXiv:2402.14740; GRPO, arXiv:2402.03300)."""
    group_size: int = Field(1, ge=1)
    """Answers to each prompt; RLOO and GRPO need at least 2."""
    critic: Literal["head", "model"] = "head"
    """The value function: a head on the policy's last hidden state, or a model of its own that starts from the reward
    model."""
    critic_lr: float | None = Field(None, gt=0)
    """Learning rate of a critic of its own; None takes optimizer.lr."""
    critic_warmup_steps: int = Field(0, ge=0)
    """Optimiser steps at the start that train the value function alone."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL penalty (Schulman 2020): k1 is unbiased and signed, k2 half its square, k3 never negative."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """Whether the KL penalty is paid as reward, token by token, or is a term of the loss, as in GRPO."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Subtracted from the (unscaled) score of an answer that reached its limit without ending."""
    whiten_rewards: bool = False
    """Scale a phase's token rewards to variance 1 over all ranks; their mean is kept."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus, in nats per token."""
    max_update_kl: float | None = Field(None, gt=0)
    """End a phase's epochs once the policy is this far (approximate KL, nats per token) from where it was sampled."""
    dense_reward_every: int = Field(0, ge=0)
    """Score every so many tokens of an answer as well, and pay the reward's increments where they arise; 0 scores the
    whole answer only."""
    delta_reward: bool = True
    """Subtract the reward of the data set's own answer to the same prompt. Training prompts' are not asked for where
    they cancel: with "rloo" or "grpo", cliprange_reward null, and scale_reward "ref" or "none"."""


class ILQL(Section):
    """Implicit language Q-learning's hyper-parameters (Snell et al. 2022, arXiv:2206.11871) under trlX's names."""

    tau: float = Field(0.6, gt=0, lt=1)
    """Expectile of V's regression to the smaller target Q; 0.5 is the mean."""
    gamma: float = Field(0.99, gt=0, le=1)
    """Discount of later rewards, per token."""
    cql_scale: float = Field(0.1, ge=0)
    """Weight of the conservative term, cross-entropy of the Q heads to the data's tokens."""
    awac_scale: float = Field(1.0, ge=0)
    """Weight of the language model's advantage-weighted cross-entropy."""
    alpha: float = Field(1e-4, gt=0, le=1)
    """How far the target heads move to the trained ones at a synchronisation."""
    beta: float = Field(0.0, ge=0)
    """Weights tokens of the language model's loss by exp(beta * (Q - V)); 0 weights all alike."""
    steps_for_target_q_sync: int = Field(1, ge=1)
    """Optimiser steps between synchronisations."""
    two_qs: bool = True
    """Two Q heads, of which the smaller value counts."""
    betas: tuple[Annotated[float, Field(ge=0)], ...] = (1.0, 4.0)
    """Decoding adds beta * (Q - V) to the log-probabilities: evaluation is done with each of these."""
    best_beta: float | None = None
    """The beta of `betas` by which the best checkpoint is chosen, and which the result decodes with; None takes the
    last."""
    reward_chosen: float = 1.0
    """Reward of a chosen answer, on its last token."""
    reward_rejected: float = -1.0
    """Reward of a rejected answer, on its last token."""
