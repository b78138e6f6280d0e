"""Settings of PPO's loss that make no sense together. ValueError with one line: key, fault, remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config.methods import PPO


def check_losses(ppo: PPO, total_steps: int) -> None:
    """Refuse terms that would do nothing, or not what their name says."""
    if ppo.kl_placement == "loss" and ppo.kl_estimator == "k1":
        raise ValueError(
            'ppo.kl_estimator: the gradient of "k1" is zero on average, so that it does nothing in the loss; with '
            'ppo.kl_placement = "loss" take "k3", as GRPO, or "k2"'
        )
    if ppo.advantage != "gae":
        for key, used in (
            ("whiten_rewards", ppo.whiten_rewards),
            ("critic_warmup_steps", ppo.critic_warmup_steps > 0),
            ("dense_reward_every", ppo.dense_reward_every > 0),
        ):
            if used:
                raise ValueError(
                    f'ppo.{key}: means nothing with ppo.advantage = "{ppo.advantage}", which compares whole answers; '
                    'leave it out, or take "gae"'
                )
    if ppo.critic_warmup_steps and not ppo.vf_coef:
        raise ValueError("ppo.critic_warmup_steps: ppo.vf_coef = 0 trains no value function; raise it, or leave it out")
    if ppo.critic_warmup_steps >= total_steps:
        raise ValueError(
            f"ppo.critic_warmup_steps: {ppo.critic_warmup_steps} are all of train.total_steps = {total_steps}: the "
            "policy would never be trained; lower the first"
        )
