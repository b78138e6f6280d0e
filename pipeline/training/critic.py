"""A value function of its own: a second model, trained in full, that starts from the run's reward model.

As in Ouyang et al. 2022 (arXiv:2203.02155) and Huang et al. 2024 (arXiv:2403.17031): the reward model's score of a
text is its guess of the reward to come. The score head is kept, so values start as the reward model's scores of what
is written so far. Rewards are scores less a baseline where they are deltas, so the head gets a bias, which starts at
minus the baselines' mean; the rest (the division by sigma, scores of half an answer) is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from pipeline.errors import UserError
from pipeline.training.last_layer import last_layer_at
from pipeline.training.models import disable_dropout, load_reward_model
from pipeline.training.packed import is_packable, packed
from pipeline.training.split import unregister_buffers


class WideLinear(nn.Linear):
    """A linear layer that computes in float32 whatever its weights and its input are: a value in bfloat16 is off by up
    to 1/256 of itself, which advantages, as differences of values, would be made of."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, device="meta")
        self.weight = like.weight
        self.bias = like.bias

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(input.float(), self.weight.float(), bias)


class Critic(nn.Module):
    """Values of positions from ids: a causal model's last hidden states under a linear head with one output."""

    def __init__(self, model: PreTrainedModel, bias: float = 0.0) -> None:
        super().__init__()
        score = model.score
        if not isinstance(score, nn.Linear) or score.out_features != 1:
            raise UserError(f"ppo.critic: {type(model).__name__}'s score head is not linear; take critic = head")
        self.body = model.base_model
        self.score = WideLinear(nn.Linear(score.in_features, 1).to(score.weight))
        with torch.no_grad():
            self.score.weight.copy_(score.weight)
            self.score.bias.fill_(bias + (0.0 if score.bias is None else float(score.bias)))

    def forward(
        self,
        ids: Tensor,  # (1, T), rows one behind the other
        lengths: Sequence[int],  # of the rows, T in all
        index: Tensor,  # (n,) places in T
    ) -> Tensor:  # (n,) float32
        """The values at `index`."""
        with packed(self.body, lengths, ids.device) as positions, last_layer_at(self.body, index):
            hidden = self.body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0, index]
        values: Tensor = self.score(hidden).squeeze(-1)
        return values


def load_critic(folder: Path, device: torch.device, bias: float) -> Critic:
    """The critic that starts from the reward model in `folder`, in float32, all of it trained, without dropout."""
    model = load_reward_model(folder, torch.float32)
    disable_dropout(model)
    critic = Critic(model.to(device), bias).requires_grad_(True)
    unregister_buffers(critic)
    return critic


def check_critic(same: bool, folder: Path) -> None:
    """UserError for a reward model that no critic can start from: another vocabulary, or a type that cannot be packed.

    The critic reads the policy's ids.
    """
    if not same:
        raise UserError(
            f"ppo.critic: the reward model ({folder}) has another tokenizer than the policy, whose ids a critic model "
            'would read; take "head"'
        )
    kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    if not is_packable(kind):
        raise UserError(f"ppo.critic: a reward model of the type '{kind}' cannot be a critic; take \"head\"")
