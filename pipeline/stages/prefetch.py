"""prefetch: data and models, fetched or made, before any job that has no internet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipeline.containers.command import choose_engine
from pipeline.run.directory import Outputs
from pipeline.run.hashing import hash_tree
from pipeline.run.sources import EMBEDDED, SETTINGS, models_of, pins
from pipeline.stages.base import Context, Stage, Work, module_command
from pipeline.stages.sandbox import image_settings
from pipeline.stages.surroundings import hub_home


class Prefetch(Stage):
    name = "prefetch"
    version = 2
    offline = False
    contained = False

    def settings(self, context: Context) -> dict[str, Any]:
        config = context.config
        settings: dict[str, Any] = {
            "seed": config.seed,
            "model": {"path": config.model.path, "revision": config.model.revision},
            "reward_model": {"checkpoint": config.reward_model.checkpoint, "revision": config.reward_model.revision},
            "data": config.data.model_dump(mode="json", exclude={"demo"}),
        }
        if "checkpoint_base" in models_of(config):
            settings["checkpoint_base"] = config.reward_model.checkpoint_base
            if config.reward_model.checkpoint_base_revision is not None:
                settings["checkpoint_base_revision"] = config.reward_model.checkpoint_base_revision
        if config.model.tokenizer_path is not None:
            settings["tokenizer"] = config.model.tokenizer_path
        if config.model.path == EMBEDDED:
            settings["model"]["embedded"] = config.model.embedded.model_dump(mode="json")
        if config.data.source == "demo":
            settings["data"]["demo"] = config.data.demo.model_dump(mode="json")
        else:
            folder = Path(os.environ.get("HH_DATA", "") if config.data.source == "hh" else config.data.source)
            for split in ("train", "test"):
                for path in (folder / f"{split}.jsonl", folder / f"{split}.jsonl.gz"):
                    if path.is_file():
                        settings["data"][f"{split}_sha256"] = hash_tree(path, context.hashes)[0]
        engine = choose_engine(config.sandbox.engine, config.cluster.engine)
        if "sandbox" in config.all and engine not in ("venv", "none"):
            settings["sandbox"] = {"engine": engine, **image_settings(context)}
        return settings

    def command(self, work: Work) -> list[str]:
        return module_command("pipeline.data.prefetch", work)

    def missing(self, context: Context, outputs: Outputs) -> str | None:
        gone = super().missing(context, outputs)
        home = hub_home(context.config.cluster, os.environ)
        for key, pin in pins(context.run).items():
            if gone is not None or key == "data":  # its rows are in the run
                continue
            gone = f"{SETTINGS[key]}: {fault}" if (fault := pin.fault()) else None
            if gone is None and home is not None and not Path(pin.folder).resolve().is_relative_to(home.resolve()):
                gone = f"{SETTINGS[key]}: {pin.folder} is not in cluster.cache ({home})"
        if gone is None and "sandbox" in context.config.all:
            from pipeline.serving.sandbox import lost  # only here: a plan that ends before needs none of it

            gone = lost(context.config, outputs.values.get("sandbox", {}), context.run.values("sandbox"))
        return gone

    def headline(self, values: dict[str, Any]) -> str:
        taken = [f"{pin['name']}@{pin['commit'][:8]}" for pin in values.get("hub", {}).values()]
        rows = f"{values.get('train_rows', 0)} training and {values.get('test_rows', 0)} test dialogues"
        return "; ".join([rows, ", ".join(taken)] if taken else [rows])
