"""What PPO trains: the top of the language model, and a value head on its last hidden state or a critic beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.training.critic import Critic, WideLinear
from pipeline.training.last_layer import last_layer_at
from pipeline.training.packed import packed
from pipeline.training.split import Top
from pipeline.training.vocabulary import token_logprobs


class TokenOutputs(NamedTuple):
    """Per sampled token (n,), float32."""

    logprobs: Tensor
    values: Tensor
    entropy: Tensor | None


class Policy(nn.Module):
    """Log-probabilities, values and (on request) entropies of sampled tokens, from the trunk's hidden states.

    Everything happens in `forward`, so that a data-parallel wrapper sees it.
    """

    def __init__(self, top: Top, hidden_size: int, seed: int, critic: Critic | None = None) -> None:
        super().__init__()
        self.top = top
        self.critic = critic
        self.value = value_head(hidden_size, seed) if critic is None else None

    def forward(
        self,
        states: Tensor,  # (1, T, H), rows one behind the other; ids (1, T) where there is no trunk
        lengths: Sequence[int],  # of the rows, T in all
        index: Tensor,  # (n,) places in T whose hidden state predicts a sampled token
        targets: Tensor,  # (n,) the sampled ids
        temperature: float,
        with_entropy: bool = False,
        values_alone: bool = False,
        ids: Tensor | None = None,  # (1, T), of the same positions; what a critic of its own reads
    ) -> TokenOutputs:
        """`values_alone`: no gradient of the values reaches the language model, as while only the critic is trained."""
        hidden = _hidden(self.top, states, lengths, index)  # (n, H): only these meet the vocabulary
        logprobs, entropy = token_logprobs(self.top.head, hidden, targets, temperature, with_entropy)
        values = self._values(hidden.detach() if values_alone else hidden, ids, lengths, index)
        return TokenOutputs(logprobs, values, entropy)

    def _values(self, hidden: Tensor, ids: Tensor | None, lengths: Sequence[int], index: Tensor) -> Tensor:
        """Values (n,), from the policy's last hidden states (n, H) or from the critic."""
        if self.critic is not None:
            values: Tensor = self.critic(ids, lengths, index)
        else:
            assert self.value is not None
            values = self.value(hidden).squeeze(-1)
        return values


def value_head(hidden_size: int, seed: int) -> nn.Sequential:
    """Linear(H, 2H) - ReLU - Linear(2H, 1), as trlX's, from a seed of its own.

    The last layer starts at zero: values are then 0 at first, so that the first phase's advantages are discounted
    rewards and not the noise of a random function.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, last = nn.Linear(hidden_size, 2 * hidden_size), nn.Linear(2 * hidden_size, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(first, nn.ReLU(), WideLinear(last))


@torch.no_grad()
def reference_logprobs(
    top: Top, states: Tensor, lengths: Sequence[int], index: Tensor, targets: Tensor, temperature: float
) -> Tensor:
    """Log-probabilities (n,) of the same tokens under a frozen top over the same states."""
    hidden = _hidden(top, states, lengths, index)
    return token_logprobs(top.head, hidden, targets, temperature, False)[0]


def _hidden(top: Top, states: Tensor, lengths: Sequence[int], index: Tensor) -> Tensor:
    """The last hidden states (n, H) at `index` of rows of these lengths."""
    with packed(top.part, lengths, states.device) as positions, last_layer_at(top.part.body, index):
        hidden: Tensor = top.part(states, None, positions)  # (1, T, H)
    return hidden[0, index]
