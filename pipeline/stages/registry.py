"""All stages, by name."""

from __future__ import annotations

from pipeline.stages.base import Stage
from pipeline.stages.convert import Convert
from pipeline.stages.evaluate import Evaluate
from pipeline.stages.prefetch import Prefetch
from pipeline.stages.reward_model import RewardModel
from pipeline.stages.sandbox import Sandbox
from pipeline.stages.serve import Serve
from pipeline.stages.sft import Sft
from pipeline.stages.train import Train

REGISTRY: dict[str, Stage] = {
    stage.name: stage
    for stage in (Prefetch(), Sft(), RewardModel(), Sandbox(), Convert(), Serve(), Train(), Evaluate())
}
