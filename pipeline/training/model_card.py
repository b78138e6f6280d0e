"""What a trained model's folder says of itself: README.md, the card of the hub, and generation_config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.config.schema import Config
from pipeline.data.tokens import end_id, pad_id
from pipeline.run import atomic
from pipeline.run.directory import RunDir
from pipeline.run.sources import EMBEDDED, pins
from pipeline.training.metrics import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CARD = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CURVES = (
    "reward/mean",
    "reward/mean@*",  # ILQL's, by beta
    "rollout_scores/mean",
    "policy/kl",
    "losses/total_loss",
    "losses/loss",
    "test/*",
)
"""Metrics that are shown over the steps, as far as there are any; a star stands for any ending."""
_SHOWN = 12
"""Steps of such a table."""
_NOT_OF_THE_MODEL = {
    "tracker",
    "project_name",
    "keep_checkpoints",
    "checkpoint_interval",
    "log_rollouts",
    "peak_tflops",
    "save_best",
}
"""Settings that change how a training is kept and shown."""
_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft")
_LOADING = {
    "text-generation": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
}


def sections_of(method: str) -> tuple[str, ...]:
    """The sections of the configuration that a training of the stage `train` follows: "ppo" or "ilql"."""
    return ("model", method, "train", "generate", "optimizer", "scheduler")


@dataclass(frozen=True)
class Card:
    """What a card says beside the configuration."""

    method: str
    """As people know it: PPO, ILQL, SFT, reward model."""
    sections: tuple[str, ...]
    """Sections of the configuration that the training followed."""
    figures: Mapping[str, Any]
    """What is known at the training's end, by name."""
    start: str | None = None
    """What the training started from, where that is not the base model itself."""
    reward_model: str | None = None
    """The reward model, with its identity."""
    task: str = "text-generation"
    """The hub's name for what the model does."""
    rows: Sequence[Row] = field(default=())
    """The training's metrics."""


_OF_THE_MACHINE = re.compile(r"(^|_)seconds?$|^metrics$")
"""Figures of a machine's day, and where it keeps its files: the same training makes the same card, bit for bit, since
what needs the model runs again when its folder has changed."""


def write_card(folder: Path, run: RunDir, config: Config, card: Card) -> None:
    """Write the card of the model in `folder`."""
    atomic.write_text(folder / CARD, render_card(run, config, card))


def write_generation_config(folder: Path, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """Let `generate` sample as the run did. Stop sequences are not part of it: there they need the tokenizer."""
    from transformers import GenerationConfig

    sampling = config.generate
    settings = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=end_id(tokenizer),
        pad_token_id=pad_id(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
    )
    with atomic.disk_errors(folder):
        settings.save_pretrained(folder)


def render_card(run: RunDir, config: Config, card: Card) -> str:
    """The card as Markdown, behind the front matter that the hub reads. It holds no more than the run knows."""
    found = pins(run)
    base, data = config.model.path, config.data.source
    # A name that prefetch did not take from the hub is a folder of somebody's machine: it says nothing there.
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": card.task}
    front["tags"] = ["rlhf", card.method.lower().replace(" ", "-")]
    if _on_hub(base, "model", found):
        front["base_model"] = base
    if _on_hub(data, "data", found):
        front["datasets"] = [data]
    settings = {
        name: _public(getattr(config, name).model_dump(mode="json", exclude_none=True, exclude=_NOT_OF_THE_MODEL))
        for name in card.sections
    }
    blocks = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {card.method} on {_name(data, 'data', found)}",
        _facts(
            {
                "base model": "a random model made on the spot" if base == EMBEDDED else _name(base, "model", found),
                "started from": card.start,
                "data": _name(data, "data", found),
                "reward model": card.reward_model,
                "preset": config.preset,
                "seed": config.seed,
            }
        ),
        "## Figures\n\n"
        + _facts({name: _figure(value) for name, value in card.figures.items() if not _OF_THE_MACHINE.search(name)}),
    ]
    if curve := _curve(card.rows):
        blocks.append("## Training\n\n" + curve)
    blocks += [
        f"## Settings\n\n```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```",
        "## Versions\n\n" + _facts(_versions()),
        "## Use\n\n```python\n" + _usage(card.task) + "```",
    ]
    if card.task == "text-generation" and (stops := config.generate.stop_sequences):
        given = ", ".join(f"`{text}`" for text in stops)
        blocks.append(f"Prompts end with `Assistant:`. An answer ends with EOS; in training it also ended at {given}.")
    return "\n\n".join(blocks) + "\n"


def _usage(task: str) -> str:
    """How to load the model, wherever its folder is."""
    cls = _LOADING[task]
    lines = [
        f"from transformers import {cls}, AutoTokenizer",
        "",
        'folder = "."  # this folder, or its name on the hub',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = {cls}.from_pretrained(folder)",
    ]
    if task == "text-generation":
        lines += [
            'prompt = tokenizer("\\n\\nHuman: How do I boil an egg?\\n\\nAssistant:", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**prompt)[0]))",
        ]
    else:
        lines += [
            "# The reward is read at the EOS behind the answer.",
            'text = "\\n\\nHuman: How do I boil an egg?\\n\\nAssistant: Seven minutes." + tokenizer.eos_token',
            'print(model(**tokenizer(text, return_tensors="pt")).logits)',
        ]
    return "\n".join(lines) + "\n"


def _curve(rows: Sequence[Row]) -> str:
    """Metrics as a table of at most `_SHOWN` steps, the first and the last among them; "" without any."""
    by_step: dict[int, Row] = {}
    for row in rows:
        by_step.setdefault(row["step"], {}).update(row)
    found = dict.fromkeys(name for row in by_step.values() for name, value in row.items() if value is not None)
    names = [name for pattern in _CURVES for name in found if fnmatchcase(name, pattern)]
    steps = sorted(by_step)
    if not names or not steps:
        return ""
    if len(steps) > _SHOWN:
        steps = sorted({steps[round(i * (len(steps) - 1) / (_SHOWN - 1))] for i in range(_SHOWN)})
    lines = ["| step | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for step in steps:
        cells = [_figure(by_step[step].get(name)) or "" for name in names]
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _facts(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value is not None)


def _figure(value: Any) -> str | None:
    if value is None:
        return None
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _public(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the folders of somebody's machine: their last part says enough."""
    local = ("/", "~", "./", "../")
    return {
        key: Path(value).name if isinstance(value, str) and value.startswith(local) else value
        for key, value in settings.items()
    }


def _on_hub(name: str, source: str, found: Mapping[str, Any]) -> bool:
    return source in found and _HUB_ID.fullmatch(name) is not None


def _name(name: str, source: str, found: Mapping[str, Any]) -> str:
    """A hub id with its commit, or the last part of a folder's path."""
    if _on_hub(name, source, found):
        return f"{name} ({found[source].commit})"
    return Path(name).name


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions
