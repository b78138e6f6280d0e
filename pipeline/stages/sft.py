"""sft: supervised fine-tuning on the chosen responses; the policy's start."""

from __future__ import annotations

from typing import Any

from pipeline.config.methods import Supervised
from pipeline.config.schema import Config
from pipeline.config.training import KEPT_APART
from pipeline.run.sources import EMBEDDED
from pipeline.stages.base import Context, Stage, Work, model_identity, number, tokenizer_identity
from pipeline.stages.launch import accelerate_config, launch_command, plain_command, thread_environment


class Sft(Stage):
    name = "sft"

    def settings(self, context: Context) -> dict[str, Any]:
        config = context.config
        sft = config.sft.model_dump(mode="json", exclude=KEPT_APART)
        settings: dict[str, Any] = {"seed": config.seed, "sft": sft}
        if config.model.path != EMBEDDED:
            settings["model"] = model_identity(context, "model")
        return {**settings, **tokenizer_identity(context)}

    def needs(self, config: Config) -> tuple[str, ...]:
        return ("prefetch",)

    def command(self, work: Work) -> list[str]:
        return supervised_command("pipeline.training.sft", work, work.config.sft, "sft")

    def environment(self, work: Work) -> dict[str, str]:
        return thread_environment(work, work.config.sft.num_processes)

    def headline(self, values: dict[str, Any]) -> str:
        return f"held-out loss {number(values.get('loss'))}, perplexity {number(values.get('perplexity'), 2)}"


def supervised_command(module: str, work: Work, settings: Supervised, section: str) -> list[str]:
    """The command of a supervised stage: a launcher only where there are several processes, or a config asks for it."""
    name = settings.accelerate_config
    if settings.num_processes == 1 and name == "auto":
        return plain_command(module, work)
    if name == "auto":
        name = "ddp" if work.devices else "ddp-cpu"
    config_file = accelerate_config(name, len(work.devices), section)
    return launch_command(module, work, settings.num_processes, config_file, settings.mixed_precision)
