"""convert: the reward model as a Triton model store, checked against the eager model."""

from __future__ import annotations

from typing import Any

from pipeline.config.schema import Config
from pipeline.run.sources import models_of
from pipeline.stages.base import Context, Stage, Work, model_identity, module_command

_STORE_SETTINGS = {
    *("model_name", "flavour", "dynamic_batching", "dtype", "max_length", "max_batch_tokens", "max_batch_size"),
    *("num_threads", "parity_tolerance", "attention"),
}


class Convert(Stage):
    name = "convert"
    version = 4

    def settings(self, context: Context) -> dict[str, Any]:
        config = context.config
        settings: dict[str, Any] = {"serving": config.serving.model_dump(mode="json", include=_STORE_SETTINGS)}
        if config.reward_model.checkpoint is not None:
            settings["reward_model"] = model_identity(context, "reward_model")
        if "checkpoint_base" in models_of(config):
            settings["checkpoint_base"] = model_identity(context, "checkpoint_base")
        if config.serving.flavour == "torchscript":
            settings["image"] = config.sandbox.image  # what the graph must load in
        return settings

    def needs(self, config: Config) -> tuple[str, ...]:
        return () if config.reward_model.checkpoint is not None else ("reward-model",)

    def after(self, config: Config) -> tuple[str, ...]:
        return ("prefetch",)

    def command(self, work: Work) -> list[str]:
        return module_command("pipeline.serving.convert", work)

    def environment(self, work: Work) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(work.config.serving.num_threads)}

    def headline(self, values: dict[str, Any]) -> str:
        difference = values.get("parity_max_difference")
        parity = f", at most {difference:.1e} from the eager model" if isinstance(difference, float) else ""
        return f"{values.get('model_name', '')}{parity}"
