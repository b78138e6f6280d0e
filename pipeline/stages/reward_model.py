"""reward-model: trained on the preference pairs, unless a checkpoint is given."""

from __future__ import annotations

from typing import Any

from pipeline.config.schema import Config
from pipeline.config.training import KEPT_APART
from pipeline.run.sources import EMBEDDED
from pipeline.stages.base import Context, Stage, Work, model_identity, number, tokenizer_identity
from pipeline.stages.launch import thread_environment
from pipeline.stages.sft import supervised_command


class RewardModel(Stage):
    name = "reward-model"

    def settings(self, context: Context) -> dict[str, Any]:
        config = context.config
        elsewhere = {"checkpoint_base", "checkpoint_base_revision", *KEPT_APART}
        settings: dict[str, Any] = {
            "seed": config.seed,
            "reward_model": config.reward_model.model_dump(mode="json", exclude=elsewhere),
        }
        if config.reward_model.base == "model" and config.model.path != EMBEDDED:
            settings["model"] = model_identity(context, "model")
        return {**settings, **(tokenizer_identity(context) if config.reward_model.base == "model" else {})}

    def needs(self, config: Config) -> tuple[str, ...]:
        return ("prefetch", "sft") if config.reward_model.base == "sft" else ("prefetch",)

    def command(self, work: Work) -> list[str]:
        return supervised_command("pipeline.training.reward_model", work, work.config.reward_model, "reward_model")

    def environment(self, work: Work) -> dict[str, str]:
        return thread_environment(work, work.config.reward_model.num_processes)

    def headline(self, values: dict[str, Any]) -> str:
        return f"test accuracy {number(values.get('accuracy'))}, margin {number(values.get('margin'), 2)}"
