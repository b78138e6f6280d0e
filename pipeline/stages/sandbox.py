"""sandbox: the container or environment that holds tritonserver, shared by all runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pipeline.run.directory import Outputs
from pipeline.stages.base import Context, Stage, Work, module_command


class Sandbox(Stage):
    name = "sandbox"
    offline = False

    def settings(self, context: Context) -> dict[str, Any]:
        from pipeline.serving import engines, environment

        settings: dict[str, Any] = {"sandbox": context.config.sandbox.model_dump(mode="json")}
        if engines.choose_engine(context.config.sandbox.engine) == "venv":
            settings["python"] = list(sys.version_info[:2])
            settings["requirements"] = environment.requirements()  # the trainer's own versions
        return settings

    def command(self, work: Work) -> list[str]:
        return module_command("pipeline.serving.sandbox", work)

    def missing(self, context: Context, outputs: Outputs) -> str | None:
        path = outputs.values.get("path")
        return f"its environment is gone ({path})" if path and not Path(path).exists() else None

    def headline(self, values: dict[str, Any]) -> str:
        made = "built" if values.get("built") else "found in the cache"
        return f"tritonserver {values.get('tritonserver', '')} ({values.get('engine', '')}, {made})"
