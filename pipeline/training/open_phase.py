"""A phase whose epochs are under way: what a checkpoint in the middle of it holds beside weights and state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.serving.usage import Traffic
from pipeline.training.decode import Response
from pipeline.training.experience import Packing
from pipeline.training.metrics import Row
from pipeline.training.microbatches import Minibatch
from pipeline.training.state import TrainState, state_from
from pipeline.training.update import Experience, Targets
from pipeline.training.updater import Taken


@dataclass
class OpenPhase:
    """Sampled, scored, and partly trained."""

    first: int
    """The step count at its beginning."""
    exp: Experience
    targets: Targets
    plans: list[list[Minibatch]]
    """A function of the responses' lengths and the seed, so that it need not be kept."""
    after: TrainState
    """What follows it, but for step and seconds."""
    row: Row
    """What is known to be logged of it."""
    traffic: list[Traffic]
    """What each rank's reward client asked for."""
    began: float
    """Of the clock."""
    seconds: float
    """Spent on it so far, without checkpoints."""
    train_seconds: float
    """Of these, on its targets and epochs."""
    taken: Taken | None = None
    losses: dict[str, float] = field(default_factory=dict)
    """What to log of the steps taken."""

    @property
    def step(self) -> int:
        """The step count now."""
        return self.first + (len(self.taken.norms) if self.taken else 0)

    @property
    def complete(self) -> bool:
        """Whether its epochs are done."""
        return self.taken is not None and self.taken.complete


def plain(phase: OpenPhase) -> dict[str, Any]:
    """As plain values and tensors; the plan and the losses are worked out again."""
    exp = vars(phase.exp)
    return {
        **{name: getattr(phase, name) for name in ("first", "row", "began", "seconds", "train_seconds")},
        "exp": {
            **exp,
            "responses": [vars(response) for response in phase.exp.responses],
            "packing": vars(phase.exp.packing),
        },
        "targets": vars(phase.targets),
        "after": phase.after.plain(),
        "traffic": [asdict(each) for each in phase.traffic],
        "taken": vars(phase.taken) if phase.taken else None,
    }


def experience_from(raw: Mapping[str, Any], device: Any) -> tuple[Experience, Targets]:
    """Experience and targets as `plain` gave them, on `device`."""
    exp = _moved(raw["exp"], device)
    exp["responses"] = [Response(**_moved(response, device)) for response in exp["responses"]]
    exp["packing"] = Packing(**exp["packing"])
    return Experience(**exp), Targets(**_moved(raw["targets"], device))


def phase_from(raw: Mapping[str, Any], exp: Experience, targets: Targets, plans: list[list[Minibatch]]) -> OpenPhase:
    """A phase as `plain` gave it."""
    return OpenPhase(
        **{name: raw[name] for name in ("first", "row", "began", "seconds", "train_seconds")},
        exp=exp,
        targets=targets,
        plans=plans,
        after=state_from(raw["after"]),
        traffic=[Traffic(**each) for each in raw["traffic"]],
        taken=Taken(**raw["taken"]) if raw["taken"] else None,
    )


def _moved(values: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """With the tensors among `values` on `device`."""
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in values.items()}
