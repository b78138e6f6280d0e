"""sandbox: the container or environment that holds tritonserver, shared by all runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config
from pipeline.containers import advisories
from pipeline.containers.command import choose_engine
from pipeline.containers.source import content_digest, parse_source
from pipeline.run.directory import Outputs
from pipeline.stages.base import Context, Stage, Work, module_command


class Sandbox(Stage):
    name = "sandbox"
    offline = False
    contained = False

    def settings(self, context: Context) -> dict[str, Any]:
        from pipeline.serving import environment

        config = context.config
        settings: dict[str, Any] = {"sandbox": config.sandbox.model_dump(mode="json", exclude={"engine"})}
        engine = settings["engine"] = choose_engine(config.sandbox.engine, config.cluster.engine)
        if engine == "venv":
            settings["python"] = list(sys.version_info[:2])
            settings["requirements"] = environment.requirements()  # the trainer's own versions
        elif engine != "none":
            settings |= image_settings(context)
        return settings

    def after(self, config: Config) -> tuple[str, ...]:
        from pipeline.serving.sandbox import needs_wheels

        engine = choose_engine(config.sandbox.engine, config.cluster.engine)
        alone = engine == "none" or (engine == "venv" and not needs_wheels(config))
        return () if alone else ("prefetch",)  # which fetches the image, or the packages

    def command(self, work: Work) -> list[str]:
        return module_command("pipeline.serving.sandbox", work)

    def missing(self, context: Context, outputs: Outputs) -> str | None:
        parts = [outputs.values.get("packages")]
        if outputs.values.get("engine") != "docker":
            parts.append(outputs.values.get("path"))
        gone = [part for part in parts if part and not Path(part).exists()]
        return f"its files are gone ({gone[0]})" if gone else None

    def headline(self, values: dict[str, Any]) -> str:
        made = "built" if values.get("built") else "found in the cache"
        digest = f", {values['digest'][:19]}" if values.get("digest") else ""
        version = values.get("tritonserver", "")
        holes = ", with known holes" if advisories.missing_fixes(advisories.release_of(version)) else ""
        return f"tritonserver {version}{holes} ({values.get('engine', '')}{digest}, {made})"


def image_settings(context: Context) -> dict[str, Any]:
    """What identifies the image and the packages of a container engine, as far as it is known before they are there."""
    from pipeline.serving import environment

    settings = context.config.sandbox
    found: dict[str, Any] = {"image": settings.image}
    digest = content_digest(parse_source(settings.image), context.hashes)
    if digest is not None:
        found["image_sha256"] = digest
    if context.config.serving.flavour == "torchscript":
        found["flavour"] = "torchscript"  # needs other things of an image, and no packages
    elif settings.packages == "trainer":
        found["requirements"] = environment.package_pins(settings.python)
    return found
