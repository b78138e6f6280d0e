"""The step of the lowest held-out loss of a supervised training and, where it is asked for, the model of that step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.training.checkpoint import Checkpoints

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Best:
    """The best evaluation so far; to be asked by every rank."""

    accelerator: Accelerator
    checkpoints: Checkpoints
    keep: bool
    """Whether its weights are kept."""
    total_steps: int
    state: dict[str, Any] = field(default_factory=dict)
    """What a resume must know: `best_step`, by which checkpoints tell what is still needed, and its `figures`."""

    @property
    def step(self) -> int:
        """Its step."""
        return int(self.state["best_step"])

    @property
    def figures(self) -> dict[str, float]:
        """What was measured there; one of them is "loss"."""
        return dict(self.state["figures"])

    @property
    def is_last(self) -> bool:
        """Whether no earlier step was better than the last."""
        return self.step == self.total_steps

    def consider(self, step: int, figures: dict[str, float]) -> None:
        """Remember an evaluation after `step` steps if it is better. The weights of the last step are at hand."""
        if self.state and not (figures["loss"] < self.figures["loss"] or math.isnan(self.figures["loss"])):
            return
        self.state |= {"best_step": step, "figures": figures}
        if self.keep and step < self.total_steps:
            self.checkpoints.save_best(self.accelerator, step, figures["loss"])

    def load(self) -> None:
        """Give the model the weights of the best step. UserError where they are gone: later stages rely on them."""
        if not self.checkpoints.load_best(self.accelerator, self.step):
            folder = self.checkpoints.folder
            raise UserError(
                f"{folder}: the weights of step {self.step}, the best, are damaged or gone; remove the folder to train "
                "again"
            )
