"""Checks across the settings of one training method. Each raises ValueError with one line: key, fault, remedy."""

from __future__ import annotations

from pipeline.config.methods import ILQL, PPO

GROUPED = ("rloo", "grpo")
"""Advantages that compare the answers to one prompt: there is no value function."""


def check_ppo(ppo: PPO, batch_size: int) -> None:
    """Sizes that divide each other, and choices that exclude each other. `batch_size` is each process's."""
    if ppo.num_rollouts % batch_size:
        raise ValueError(
            f"ppo.num_rollouts: {ppo.num_rollouts} is not a multiple of train.batch_size = {batch_size}; "
            "every optimiser step takes a full batch"
        )
    if ppo.num_rollouts % ppo.group_size:
        raise ValueError(
            f"ppo.num_rollouts: {ppo.num_rollouts} is not a multiple of ppo.group_size = {ppo.group_size}; "
            "every prompt gets a full group of answers"
        )
    if ppo.scale_reward == "ref" and ppo.ref_std is None:
        raise ValueError('ppo.ref_std: is needed by ppo.scale_reward = "ref"; give the standard deviation')
    if ppo.advantage in GROUPED:
        _check_grouped(ppo)
    if ppo.kl_placement == "loss" and ppo.kl_estimator == "k1":
        raise ValueError(
            'ppo.kl_estimator: "k1" has a gradient of 0 on average, so ppo.kl_placement = "loss" would hold nothing '
            "back; take k2 or k3"
        )
    if ppo.critic == "head" and ppo.critic_lr is not None:
        raise ValueError(
            'ppo.critic_lr: a value head is trained at optimizer.lr; leave it out, or take ppo.critic = "model"'
        )


def _check_grouped(ppo: PPO) -> None:
    """What needs a value function has no use without one."""
    if ppo.group_size < 2:
        raise ValueError(
            f'ppo.group_size: {ppo.group_size} gives ppo.advantage = "{ppo.advantage}" no other answer to compare '
            "with; give 2 or more"
        )
    if ppo.critic == "model":
        raise ValueError(
            f'ppo.critic: "model" is of no use to ppo.advantage = "{ppo.advantage}", which has no value function; '
            "leave it out"
        )
    if ppo.critic_warmup_steps:
        raise ValueError(
            f"ppo.critic_warmup_steps: {ppo.critic_warmup_steps} would train nothing: ppo.advantage = "
            f'"{ppo.advantage}" has no value function; leave it out'
        )


def check_ilql(ilql: ILQL) -> None:
    """The betas of decoding, and rewards that tell answers apart."""
    if not ilql.betas:
        raise ValueError("ilql.betas: is empty, so nothing could be decoded; give at least one beta, as in [1.0]")
    if len(set(ilql.betas)) < len(ilql.betas):
        raise ValueError(f"ilql.betas: {list(ilql.betas)} holds a beta twice; remove one")
    if ilql.best_beta is not None and ilql.best_beta not in ilql.betas:
        raise ValueError(
            f"ilql.best_beta: {ilql.best_beta} is not among ilql.betas = {list(ilql.betas)}; give one of these, or "
            "leave it out for the last"
        )
    if ilql.reward_chosen <= ilql.reward_rejected:
        raise ValueError(
            f"ilql.reward_chosen: {ilql.reward_chosen} is not above ilql.reward_rejected = {ilql.reward_rejected}; "
            "chosen answers must be worth more"
        )
