"""The commands set up their process; a test that calls one in its own sets it right afterwards."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture
def own_process_state() -> Iterator[None]:
    """Signals, repeatable kernels and accelerate's singletons are as they were."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    handlers = [signal.getsignal(number) for number in numbers]
    fresh_accelerate()
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    fresh_accelerate()


def fresh_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
