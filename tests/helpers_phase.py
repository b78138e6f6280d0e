"""A whole phase of a tiny model in this process, as one of two ranks if wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers_ppo import HashScorer, tiny_config, tiny_model, tokenizer
from helpers_update import updater
from torch import Tensor

from pipeline.data.preferences import Preference
from pipeline.run.directory import RunDir
from pipeline.training.metrics import Row
from pipeline.training.phase import Phases
from pipeline.training.policy import Policy
from pipeline.training.ranks import Ranks
from pipeline.training.rollout import Sampler
from pipeline.training.scoring_text import ScoringText
from pipeline.training.split import frozen_reference, split_model
from pipeline.training.state import Data, TrainState
from pipeline.training.stopping import StopSequences

CPU = torch.device("cpu")
ROWS = [Preference(f"\n\nHuman: Say {word}\n\nAssistant:", " yes", " no") for word in "abcdefghijklmnop"]


class TwoRanks(Ranks):
    """Rank 0 of two that see the same; remembers what is exchanged."""

    def __init__(self) -> None:
        super().__init__(0, 2, CPU)
        object.__setattr__(self, "said", [])
        self.said: list[str]

    def sum(self, values: Tensor) -> Tensor:
        self.said.append("sum")
        return 2 * values

    def gather_rows(self, values: Tensor) -> Tensor:
        self.said.append("gather_rows")
        return torch.stack([values.detach()] * 2)

    def gather(self, value: Any) -> list[Any]:
        self.said.append("gather")
        return [value, value]


def phases(
    root: Path, ranks: Ranks, scorer: HashScorer, baselines: dict[int, float] | None = None, **ppo: Any
) -> Phases:
    """Phases of eight rollouts and two epochs of two steps."""
    config = tiny_config(ppo={"num_rollouts": 8, "chunk_size": 8, "ppo_epochs": 2, "horizon": 100, **ppo})
    split = split_model(tiny_model(spread=2.0), 1)
    reference = frozen_reference(split)
    stops = StopSequences(tokenizer(), list(config.generate.stop_sequences))
    scoring = ScoringText(tokenizer(), tokenizer(), True, stops, 96)
    steps = updater(Policy(split.top, split.hidden_size, seed=1), config.ppo)
    steps.ranks, steps.temperature = ranks, config.generate.temperature
    autocast: Any = steps.accelerator.autocast
    answers: Any = scorer
    sampler = Sampler(split, tokenizer(), scoring, answers, config.generate, config.prompt_length, autocast)
    never: Any = False
    return Phases(
        RunDir(root), config, Data(ROWS, ROWS, baselines, None), sampler, steps, reference, ranks, never, root
    )


def run_phase(trainer: Phases, state: TrainState) -> tuple[TrainState, Row]:
    """A phase from its first prompt to its last step."""
    phase = trainer.begin(state)
    assert phase is not None
    trainer.advance(phase, lambda taken: False)
    return trainer.finish(phase)
