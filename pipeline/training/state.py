"""What PPO carries from phase to phase beside weights and optimiser, and the data that it is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import Config
from pipeline.training.control import RunningMoments, moments_from

if TYPE_CHECKING:
    from pipeline.data.preferences import Preference


@dataclass(frozen=True)
class TrainState:
    """Everything that a resume needs beside weights and optimiser; the same on every rank."""

    kl_coefficient: float
    step: int = 0
    phase: int = 0
    """Phases done: with the seed, this is the data position and all the randomness to come."""
    moments: RunningMoments = field(default_factory=RunningMoments)
    kl: float = 0.0
    first_reward: float | None = None
    last_reward: float | None = None
    evaluated_step: int = -1
    best_reward: float | None = None
    best_step: int = 0
    rollouts: int = 0
    seconds: float = 0.0
    """Of phases, without evaluations and checkpoints."""

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def state_from(raw: Mapping[str, Any]) -> TrainState:
    """A state as a checkpoint holds it."""
    names = TrainState.__dataclass_fields__
    values = {name: raw[name] for name in names}
    return TrainState(**{**values, "moments": moments_from(raw["moments"])})


def renewed(state: TrainState) -> TrainState:
    """The state from which training goes on under another reward model: scores of two models do not compare."""
    return replace(state, moments=RunningMoments(), first_reward=None, best_reward=None, best_step=state.step)


def steps_per_phase(config: Config) -> int:
    """Optimiser steps of a full phase."""
    return config.ppo.ppo_epochs * config.ppo.num_rollouts // config.train.batch_size


@dataclass
class Data:
    """Prompts with the data set's answers, and those answers' scores where rewards are deltas."""

    train: Sequence[Preference]
    heldout: Sequence[Preference]
    train_baselines: Mapping[int, float] | None
    heldout_baselines: Mapping[int, float] | None
