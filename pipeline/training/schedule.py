"""The learning rate over optimiser steps, as a pure function: there is no scheduler state to resume."""

from __future__ import annotations

import math

from pipeline.config.training import Optimizer, Scheduler


def learning_rate(step: int, optimizer: Optimizer, scheduler: Scheduler, total_steps: int) -> float:
    """The rate of optimiser step `step` (from 0)."""
    if step < scheduler.warmup_steps:
        return optimizer.lr * (step + 1) / scheduler.warmup_steps
    done = (step - scheduler.warmup_steps) / max(1, total_steps - scheduler.warmup_steps)
    if scheduler.name == "linear":
        return optimizer.lr * (1.0 - done)
    if scheduler.name == "cosine":
        return optimizer.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    return optimizer.lr
