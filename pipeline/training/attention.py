"""Another attention in the place of a model's own, for a while."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.models.gptj.modeling_gptj import GPTJAttention


@contextmanager
def attention_replaced(
    parts: Sequence[nn.Module], name: str, of_gptj: Callable[..., Any], only: Collection[str] | None = None
) -> Iterator[None]:
    """Have the parts use transformers' implementation `name`, where theirs is among `only` (None: whatever it is).

    GPT-J has no choice of implementations, and its own, which is written out, widens keys to float32: `of_gptj` takes
    its place in any case.
    """
    modules = [module for part in parts for module in part.modules()]
    written_out = [module for module in modules if isinstance(module, GPTJAttention)]
    held: list[Any] = [module.config for module in modules if hasattr(module, "config")]
    configs = {id(config): config for config in held if hasattr(config, "_attn_implementation")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    taken = [key for key, own in before.items() if written_out or only is None or own in only]
    for key in taken:
        configs[key]._attn_implementation = name
    for module in written_out:
        module._attn = of_gptj
    try:
        yield
    finally:
        for key in taken:
            configs[key]._attn_implementation = before[key]
        for module in written_out:
            del module._attn
