"""serve: tritonserver, supervised, for as long as the training that it serves."""

from __future__ import annotations

import sys
from typing import Any

from pipeline.config.schema import Config
from pipeline.stages.base import Context, Stage, Work


class Serve(Stage):
    """A service: it never becomes "done", it runs beside train; see `pipeline.stages.service`."""

    name = "serve"

    def settings(self, context: Context) -> dict[str, Any]:
        return {"serving": context.config.serving.model_dump(mode="json")}

    def needs(self, config: Config) -> tuple[str, ...]:
        return ("convert", "sandbox")

    def command(self, work: Work) -> list[str]:
        return [sys.executable, "-m", "pipeline.submit", "--stage", "serve", "--run-dir", str(work.run.root)]
