"""The learning rate over optimiser steps, as a pure function: there is no scheduler state to resume."""

from __future__ import annotations

import math

from pipeline.config.training import Optimizer, Scheduler


def learning_rate(step: int, optimizer: Optimizer, scheduler: Scheduler, total_steps: int) -> float:
    """The rate of optimiser step `step` (from 0): after the warm-up, from the peak to `final` of it at `total_steps`.

    The cosine is SGDR's (Loshchilov and Hutter 2016, arXiv:1608.03983, eq. 5), without restarts.
    """
    if step < scheduler.warmup_steps:
        return optimizer.lr * (step + 1) / scheduler.warmup_steps
    done = (step - scheduler.warmup_steps) / max(1, total_steps - scheduler.warmup_steps)
    done = min(1.0, done)
    if scheduler.name == "linear":
        left = 1.0 - done
    elif scheduler.name == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        return optimizer.lr
    return optimizer.lr * (scheduler.final + (1.0 - scheduler.final) * left)
