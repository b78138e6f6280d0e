"""train: PPO or ILQL under accelerate on the devices that the server leaves free."""

from __future__ import annotations

from typing import Any

from pipeline.config.schema import Config
from pipeline.config.training import KEPT_APART, SHOWN_APART
from pipeline.errors import UserError
from pipeline.run.sources import EMBEDDED
from pipeline.stages.base import Context, Stage, Work, model_identity, number, tokenizer_identity
from pipeline.stages.launch import accelerate_config, launch_command, precision_of, thread_environment


class Train(Stage):
    name = "train"

    def settings(self, context: Context) -> dict[str, Any]:
        config = context.config
        settings: dict[str, Any] = {
            "seed": config.seed,
            "num_layers_unfrozen": config.model.num_layers_unfrozen,
            "lora": config.model.lora.model_dump(mode="json"),
            "train": config.train.model_dump(mode="json", exclude=KEPT_APART | SHOWN_APART),
            "serving_max_length": config.serving.max_length,
        }
        for name in ("generate", "optimizer", "scheduler"):
            settings[name] = getattr(config, name).model_dump(mode="json")
        settings |= method_settings(config)
        if "sft" not in config.all and config.model.path != EMBEDDED:
            settings["model"] = model_identity(context, "model")
        return {**settings, **judge(context), **tokenizer_identity(context)}

    def needs(self, config: Config) -> tuple[str, ...]:
        return (*policy_start(config), *reward_source(config))

    def after(self, config: Config) -> tuple[str, ...]:
        return ("serve",)

    def command(self, work: Work) -> list[str]:
        config_file = accelerate_config(work.config.train.accelerate_config, len(work.devices))
        processes = num_processes(work)
        module = f"pipeline.training.{work.config.train.method}"
        return launch_command(module, work, processes, config_file, precision_of(config_file))

    def environment(self, work: Work) -> dict[str, str]:
        return thread_environment(work, num_processes(work))

    def headline(self, values: dict[str, Any]) -> str:
        first, last = values.get("reward_mean_first"), values.get("reward_mean_last")
        return f"{values.get('steps', '?')} steps, held-out reward {number(first)} to {number(last)}"


def method_settings(config: Config) -> dict[str, Any]:
    """What only PPO or only ILQL reads; of the other's settings, those that say how rewards are measured."""
    if config.train.method == "ppo":
        return {"ppo": config.ppo.model_dump(mode="json")}
    shared = {"delta_reward": config.ppo.delta_reward, "evaluated_together": config.evaluate.batch_size}
    return {"ilql": config.ilql.model_dump(mode="json"), **shared}


def judge(context: Context) -> dict[str, Any]:
    """What of the rewards' model no artifact stands for: all of it without a store, which holds dtype and identity."""
    config = context.config
    if "convert" in config.all:
        return {}
    given = {} if reward_source(config) else {"reward_model": model_identity(context, "reward_model")}
    return {**given, "serving_dtype": config.serving.dtype, "serving_max_length": config.serving.max_length}


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
