"""The end of a run in the terminal: what training changed, and where to look."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from pipeline.run import atomic
from pipeline.run.directory import Outputs, RunDir


def render_summary(run: RunDir, run_dir: Path, outputs: Outputs) -> str:
    """The evaluation's figures, one sample, and the report's place."""
    report: dict[str, Any] = atomic.read_json(run.artifact("evaluate", "report") / "report.json") or {}
    start, policy, paired = report["sft"], report["policy"], report["paired"]
    names = report.get("names", {"sft": "SFT start", "policy": "PPO policy"})
    rows = [
        ("mean reward", "reward_mean", "{:.3f}"),
        ("over the data's own answer", "delta_mean", "{:+.3f}"),
        ("mean length (tokens)", "length_mean", "{:.1f}"),
    ]
    lines = ["", f"{'held-out prompts: ' + str(paired['n']):<30}{names['sft']:>12}{names['policy']:>12}"]
    for label, key, form in rows:
        lines.append(f"{label:<30}{form.format(start[key]):>12}{form.format(policy[key]):>12}")
    lines.append(
        f"difference {paired['mean']:+.3f}, 95% interval {paired['low']:+.3f} to {paired['high']:+.3f}; "
        f"the {names['policy'].split()[-1]} wins {100 * report['win_rate']:.0f}% of prompts; KL {report['kl']:.2f} nats"
    )
    for sample in report.get("samples", [])[:1]:
        last_turn = sample["prompt"].rsplit("Human:", 1)[-1].removesuffix("Assistant:")
        lines += ["", *_quoted("Human", last_turn)]
        for side in ("sft", "policy"):
            lines += _quoted(f"{names[side].split()[0]} {sample[f'{side}_reward']:.2f}", sample[side])
    model = "policy" if run.outputs("train") is not None else "sft"
    lines += ["", f"report: {run_dir / 'report' / 'index.html'}", f"{model}: {run_dir / 'models' / model}"]
    return "\n".join(lines)


def _quoted(speaker: str, text: str) -> list[str]:
    """A turn of a dialogue, wrapped and indented below its speaker."""
    body = " ".join(text.split()) or "(nothing)"
    return textwrap.wrap(body, width=100, initial_indent=f"  {speaker:<10}", subsequent_indent=" " * 12)
