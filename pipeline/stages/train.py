"""train: PPO under accelerate on the devices that the server leaves free."""

from __future__ import annotations

from typing import Any

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run.sources import EMBEDDED
from pipeline.stages.base import Context, Stage, Work, model_identity, number, tokenizer_identity
from pipeline.stages.launch import accelerate_config, launch_command, precision_of, thread_environment

_NOT_IN_RESULT = {"tracker", "project_name", "keep_checkpoints", "checkpoint_interval"}


class Train(Stage):
    name = "train"

    def settings(self, context: Context) -> dict[str, Any]:
        config = context.config
        settings: dict[str, Any] = {
            "seed": config.seed,
            "num_layers_unfrozen": config.model.num_layers_unfrozen,
            "lora": config.model.lora.model_dump(mode="json"),
            "train": config.train.model_dump(mode="json", exclude=_NOT_IN_RESULT),
            "serving_max_length": config.serving.max_length,
        }
        for name in ("ppo", "generate", "optimizer", "scheduler"):
            settings[name] = getattr(config, name).model_dump(mode="json")
        if "sft" not in config.all and config.model.path != EMBEDDED:
            settings["model"] = model_identity(context, "model")
        if not reward_source(config):
            settings["reward_model"] = model_identity(context, "reward_model")
        return {**settings, **tokenizer_identity(context)}

    def needs(self, config: Config) -> tuple[str, ...]:
        return (*policy_start(config), *reward_source(config))

    def after(self, config: Config) -> tuple[str, ...]:
        return ("serve",)

    def command(self, work: Work) -> list[str]:
        config_file = accelerate_config(work.config.train.accelerate_config, len(work.devices))
        processes = num_processes(work)
        return launch_command("pipeline.training.ppo", work, processes, config_file, precision_of(config_file))

    def environment(self, work: Work) -> dict[str, str]:
        return thread_environment(work, num_processes(work))

    def headline(self, values: dict[str, Any]) -> str:
        first, last = values.get("reward_mean_first"), values.get("reward_mean_last")
        return f"{values.get('steps', '?')} steps, held-out reward {number(first)} to {number(last)}"


def num_processes(work: Work) -> int:
    """Training processes of all nodes: as configured; "auto" is one a device, and 2 on a CPU."""
    wanted, count = work.config.train.num_processes, work.nodes.count
    if wanted == "auto":
        return count * (len(work.devices) or 2)
    if wanted % count:
        raise UserError(
            f"train.num_processes: {wanted} cannot be shared by {count} nodes (cluster.stages.train.nodes); "
            f"give a multiple of {count}, or auto"
        )
    return wanted


def policy_start(config: Config) -> tuple[str, ...]:
    """The stages that the policy's start and the prompts come from."""
    return ("prefetch", "sft") if "sft" in config.all else ("prefetch",)


def reward_source(config: Config) -> tuple[str, ...]:
    """The stage that the rewards' model comes from: its store where there is one, else the model itself."""
    if "convert" in config.all:
        return ("convert",)
    return () if config.reward_model.checkpoint is not None else ("reward-model",)
