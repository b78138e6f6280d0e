"""evaluate: the start against what was trained, on held-out prompts: PPO's or ILQL's policy, or the SFT model."""

from __future__ import annotations

from typing import Any

from pipeline.config.schema import Config
from pipeline.run import reward_models
from pipeline.run.sources import EMBEDDED
from pipeline.stages.base import Context, Stage, Work, model_identity, module_command, number
from pipeline.stages.train import judge, policy_start, reward_source


class Evaluate(Stage):
    name = "evaluate"

    def settings(self, context: Context) -> dict[str, Any]:
        config, announced = context.config, reward_models.announced(context.run)
        other_model = {"announced_reward_model": announced.identity} if announced is not None else {}
        start = {} if "train" in config.all or config.model.path == EMBEDDED else model_identity(context, "model")
        return {
            **other_model,
            **({"start": start} if start else {}),
            **judge(context),
            "seed": config.seed,
            "evaluate": config.evaluate.model_dump(mode="json"),
            "generate": config.generate.model_dump(mode="json"),
            "prompt_length": config.prompt_length,
        }

    def needs(self, config: Config) -> tuple[str, ...]:
        trained = ("train",) if "train" in config.all else ("sft",)
        return tuple(dict.fromkeys((*policy_start(config), *reward_source(config), *trained)))

    def command(self, work: Work) -> list[str]:
        return module_command("pipeline.evaluation.evaluate", work)

    def environment(self, work: Work) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(work.cpus)}

    def headline(self, values: dict[str, Any]) -> str:
        paired = values.get("paired", {})
        low, high = number(paired.get("low")), number(paired.get("high"))
        rate = number(100 * values["win_rate"], 0) if "win_rate" in values else "n/a"
        return f"reward {number(paired.get('mean'))} higher than the start's (95% {low} to {high}), wins {rate}%"
