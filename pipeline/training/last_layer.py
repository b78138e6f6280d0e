"""The last layer where it is read: elsewhere a token has keys and values there, and nothing else.

Of a dialogue only the answer's positions meet the head (of a pair that a reward model reads, only the two last ones).
What the last layer says of the prompt is then read by nobody, but for the keys and values that the answer looks at. So
its queries, its output projection and its MLP, 10 of a layer's 12 H^2 weights (9 where queries, keys and values are
one matrix), run at the positions that are wanted.
With two layers trained over cached states and prompts as long as answers that is a fifth of an update's arithmetic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.training.split import LAYOUTS


@contextlib.contextmanager
def last_layer_at(body: nn.Module, places: Tensor) -> Iterator[None]:
    """Forwards of the base model `body` inside are those of its whole last layer at `places` alone.

    `places` (n,) int64, each once, are in the flat (B * T) of the rows (B, T) that enter; at the others the hidden
    states that leave are no use. An architecture that is not known runs as it is.
    """
    with contextlib.ExitStack() as hooks:
        for module in alone_in_last_layer(body):
            pick = _Picked(places)
            hooks.callback(module.register_forward_pre_hook(pick.before).remove)
            hooks.callback(module.register_forward_hook(pick.after).remove)
        yield


def alone_in_last_layer(body: nn.Module) -> list[nn.Module]:
    """The modules of the last layer that work on each position alone; empty for an architecture that is not known."""
    config: Any = body.config
    layout = LAYOUTS.get(str(config.model_type))
    if layout is None:
        return []
    last: nn.Module = getattr(body, layout.layers)[-1]
    return [last.get_submodule(name) for name in layout.alone]


class _Picked:
    """A module's call at some positions: what enters is picked, what leaves is put back between zeros."""

    def __init__(self, places: Tensor) -> None:
        self.places = places
        self.shape = torch.Size()

    def before(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        whole, *rest = arguments
        self.shape = whole.shape[:-1]  # (B, T)
        return (whole.flatten(0, -2).index_select(0, self.places), *rest)  # (n, H)

    def after(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        zeros = output.new_zeros(self.shape.numel(), output.shape[-1])
        whole = zeros.index_copy(0, self.places, output)
        return whole.view(*self.shape, -1)  # (B, T, H)
