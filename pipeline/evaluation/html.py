"""The run's report as one self-contained HTML page: headline figures, training curves, answers side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from typing import Any

from pipeline.evaluation.curves import Curve, format_number, render_chart

DASH = "–"

CHARTS = (
    ("Held-out reward", "Mean reward on held-out prompts", "reward/mean"),
    ("Rollout reward", "Mean score of a phase's rollouts", "rollout_scores/mean"),
    ("KL from the start", "Root of the mean KL per response", "policy/sqrt_kl"),
    ("KL coefficient", "Penalty on a nat of KL", "kl_ctl_value"),
    ("Policy loss", "Clipped surrogate", "losses/policy_loss"),
    ("Value loss", "Clipped squared error", "losses/value_loss"),
    ("Response length", "Mean tokens of a response", "response_length/mean"),
)
"""Title, meaning and metric; a chart without a finite value is left out."""


def render_report(report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    """Render the evaluation's report and the training's metrics rows (each with a "step") as an HTML page.

    The page needs no network and no script, and follows the reader's light or dark theme. Everything from the data
    is escaped. Figures that are missing or not finite are shown as a dash, curves without points are left out.
    """
    config = _mapping(report, "config")
    name = f"{config['preset']} run" if config.get("preset") else "run"
    return _PAGE.substitute(
        title=escape(f"RLHF report: {name}"),
        settings=_settings(config),
        verdict=_verdict(report),
        headline=_headline(report),
        reward_model=_reward_model(_mapping(report, "reward_model")),
        charts=_charts(metrics),
        samples=_samples(report.get("samples") or [], _names(report)),
        style=_STYLE,
    )


def number(value: Any, digits: int = 3, sign: bool = False) -> str:
    """A figure with `digits` decimals, or a dash for what is no finite number."""
    if not _finite(value):
        return DASH
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def percent(value: Any) -> str:
    """A share as a percentage, or a dash."""
    return f"{100 * value:.1f} %" if _finite(value) else DASH


def curve_points(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """The finite (step, value) points of a metric, in order of their steps; a step's later row replaces an earlier."""
    points = {
        float(row["step"]): float(row[key]) for row in metrics if _finite(row.get("step")) and _finite(row.get(key))
    }
    return sorted(points.items())


def _verdict(report: Mapping[str, Any]) -> str:
    """The main result as one sentence."""
    paired = _mapping(report, "paired")
    if not all(_finite(paired.get(key)) for key in ("mean", "low", "high")):
        return "No paired comparison was made."
    mean, low, high = (float(paired[key]) for key in ("mean", "low", "high"))
    start, policy = (_in_text(name) for name in _names(report))
    if low > 0:
        claim = f"The {policy} earns more reward than the {start}"
    elif high < 0:
        claim = f"The {policy} earns less reward than the {start}"
    else:
        claim = f"No clear difference in reward between the {policy} and the {start}"
    prompts = f" over {paired['n']} held-out prompts" if _finite(paired.get("n")) else ""
    interval = f"{number(low, sign=True)} to {number(high, sign=True)}"
    figures = f"{number(mean, sign=True)} per answer, 95 % interval {interval}"
    return escape(f"{claim}: {figures}{prompts}; it wins {percent(report.get('win_rate'))} of the comparisons.")


def _names(report: Mapping[str, Any]) -> tuple[str, str]:
    """What the start and the trained model are called."""
    names = _mapping(report, "names")
    return str(names.get("sft", "SFT start")), str(names.get("policy", "trained policy"))


def _in_text(name: str) -> str:
    """A name inside a sentence: "Base model" loses its capital, "SFT start" keeps it."""
    return name if name[:2].isupper() else name[:1].lower() + name[1:]


def _headline(report: Mapping[str, Any]) -> str:
    names = _names(report)
    sft, policy = _mapping(report, "sft"), _mapping(report, "policy")
    paired = _mapping(report, "paired")
    interval = f"{number(paired.get('low'), sign=True)} … {number(paired.get('high'), sign=True)}"
    rows = [
        ("Mean reward", number(sft.get("reward_mean")), number(policy.get("reward_mean"))),
        ("Reward less that of the data set's answer", *(number(x.get("delta_mean"), sign=True) for x in (sft, policy))),
        ("Paired difference in reward", DASH, number(paired.get("mean"), sign=True)),
        ("95 % interval of the difference", DASH, interval),
        ("Win rate (ties count half)", DASH, percent(report.get("win_rate"))),
        (f"KL from the {_in_text(names[0])} (nats per response)", "0", number(report.get("kl"), 2)),
        ("Mean length (tokens)", *(number(x.get("length_mean"), 1) for x in (sft, policy))),
        ("Answers that end by themselves", *(percent(x.get("ended")) for x in (sft, policy))),
    ]
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th><td>{escape(first)}</td><td>{escape(second)}</td></tr>'
        for label, first, second in rows
    )
    return (
        '<table class="figures"><thead><tr><th scope="col">On held-out prompts</th>'
        f'<th scope="col">{escape(names[0])}</th><th scope="col">{escape(names[1])}</th></tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def _reward_model(values: Mapping[str, Any]) -> str:
    if not _finite(values.get("accuracy")):
        return ""
    pairs = f" on {values['pairs']} held-out pairs" if _finite(values.get("pairs")) else ""
    return (
        f'<p class="note">The reward model ranks the chosen answer first in {percent(values["accuracy"])} of cases'
        f"{escape(pairs)} (mean margin {number(values.get('margin'), 2)}).</p>"
    )


def _charts(metrics: Sequence[Mapping[str, Any]]) -> str:
    figures = []
    for title, meaning, key in CHARTS:
        points = curve_points(metrics, key)
        if not points:
            continue
        (_, first), (_, last) = points[0], points[-1]
        trend = f"{format_number(first)} → {format_number(last)}".replace("-", "−")
        figures.append(
            f"<figure><figcaption><strong>{escape(title)}</strong> <span>{escape(trend)}</span>"
            f"<small>{escape(meaning)}</small></figcaption>{render_chart(title, [Curve(title, points)])}</figure>"
        )
    if not figures:
        return '<p class="note">No training metrics were recorded.</p>'
    return f'<div class="charts">{"".join(figures)}</div>'


def _samples(samples: Sequence[Mapping[str, Any]], names: tuple[str, str]) -> str:
    if not samples:
        return '<p class="note">No samples were kept.</p>'
    return "".join(_sample(sample, names) for sample in samples)


def _sample(sample: Mapping[str, Any], names: tuple[str, str]) -> str:
    titles = {"sft": names[0], "policy": names[1], "chosen": "Data set"}
    rewards = {key: number(sample.get(f"{key}_reward"), 2, True) for key in titles}
    cards = "".join(
        f'<div class="answer {key}"><h4>{escape(title)} <span class="reward">{rewards[key]}'
        f"</span></h4><p>{_answer(sample.get(key))}</p></div>"
        for key, title in titles.items()
    )
    return (
        f'<article><div class="prompt">{_dialogue(str(sample.get("prompt", "")))}</div>'
        f'<div class="answers">{cards}</div></article>'
    )


def _answer(text: Any) -> str:
    stripped = str(text or "").strip()
    return escape(stripped) if stripped else '<em class="empty">(empty)</em>'


def _dialogue(prompt: str) -> str:
    """The prompt's turns, one paragraph each, with the speaker set apart; the open last turn is left out."""
    turns = prompt.strip().split("\n\n")
    if turns and turns[-1].strip() == "Assistant:":
        turns.pop()
    paragraphs = []
    for turn in turns:
        speaker, colon, words = turn.partition(":")
        if colon and speaker in ("Human", "Assistant"):
            paragraphs.append(f"<p><b>{speaker}</b> {escape(words.strip())}</p>")
        else:
            paragraphs.append(f"<p>{escape(turn)}</p>")
    return "".join(paragraphs)


def _settings(config: Mapping[str, Any]) -> str:
    items = [f"<span>{escape(str(key))} <b>{escape(str(value))}</b></span>" for key, value in config.items()]
    return "".join(items)


def _mapping(report: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = report.get(key)
    return value if isinstance(value, Mapping) else {}


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_STYLE = """
:root { color-scheme: light dark; --bg: #fbfaf8; --card: #fff; --ink: #1d2126; --soft: #636b75; --line: #e3e1dc;
  --s0: #2f6fb5; --s1: #c4622d; --s2: #3d8a5f; --s3: #8a5aa8; --good: #e7f1ea; }
@media (prefers-color-scheme: dark) { :root { --bg: #15181c; --card: #1d2126; --ink: #e6e8ea; --soft: #98a1ab;
  --line: #31373e; --s0: #6aa9ec; --s1: #ea9461; --s2: #6fbf93; --s3: #bb92d6; --good: #1d2f26; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 1.7rem; margin: 0 0 6px; letter-spacing: -.01em; } h2 { font-size: 1.15rem; margin: 40px 0 12px; }
.settings { display: flex; flex-wrap: wrap; gap: 4px 18px; color: var(--soft); font-size: .85rem; }
.settings b { color: var(--ink); font-weight: 600; overflow-wrap: anywhere; }
.verdict { font-size: 1.1rem; margin: 22px 0; padding: 14px 18px; background: var(--good); border-radius: 10px; }
.note { color: var(--soft); font-size: .9rem; }
.figures { border-collapse: collapse; width: 100%; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; overflow: hidden; }
.figures th, .figures td { padding: 9px 16px; border-top: 1px solid var(--line); text-align: right; }
.figures td { font-variant-numeric: tabular-nums; white-space: nowrap; }
.figures tbody th { text-align: left; font-weight: 400; } .figures thead th { border-top: 0; font-size: .85rem; }
.figures thead th:first-child { text-align: left; color: var(--soft); font-weight: 400; }
.figures td:last-child { font-weight: 600; }
.charts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); }
figure, article { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
figure { padding: 14px 14px 8px; } svg { display: block; width: 100%; height: auto; }
figcaption span { float: right; color: var(--soft); font-size: .85rem; font-variant-numeric: tabular-nums; }
figcaption small { display: block; color: var(--soft); margin-bottom: 6px; }
.grid { stroke: var(--line); stroke-width: 1; } .tick { fill: var(--soft); font-size: 10px; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.line.s0 { stroke: var(--s0); } .line.s1 { stroke: var(--s1); } .line.s2 { stroke: var(--s2); }
.line.s3 { stroke: var(--s3); }
.dot.s0 { fill: var(--s0); } .dot.s1 { fill: var(--s1); } .dot.s2 { fill: var(--s2); } .dot.s3 { fill: var(--s3); }
article { padding: 16px 18px; margin-bottom: 14px; }
.prompt p { margin: 0 0 6px; overflow-wrap: anywhere; white-space: pre-line; }
.prompt b { color: var(--soft); font-size: .8rem; font-weight: 600; margin-right: 6px; }
.answers { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); margin-top: 10px; }
.answer { border-left: 3px solid var(--line); padding-left: 12px; } .answer.policy { border-color: var(--s2); }
.answer.sft { border-color: var(--s0); }
.answer h4 { margin: 0 0 4px; font-size: .85rem; color: var(--soft); font-weight: 600; }
.answer p { margin: 0; white-space: pre-line; overflow-wrap: anywhere; } .empty { color: var(--soft); }
.reward { float: right; font-variant-numeric: tabular-nums; color: var(--ink); }
@media (max-width: 560px) { .figures th, .figures td { padding: 7px 8px; font-size: .85rem; } }
@media print { body { background: #fff; } figure, article { break-inside: avoid; } }
"""

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<h1>$title</h1>
<div class="settings">$settings</div>
<p class="verdict">$verdict</p>
$headline
$reward_model
<h2>Training</h2>
$charts
<h2>Samples</h2>
<p class="note">Held-out prompts; the number beside each answer is its reward.</p>
$samples
</main>
</body>
</html>
""")
