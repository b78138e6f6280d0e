"""What a person reads of a training: every rollout, and some evaluation prompts with their answers and rewards.

checkpoints/<fingerprint>/rollouts/phase-00000012.jsonl   a phase's rollouts of all ranks, one JSON object a line
checkpoints/<fingerprint>/samples.jsonl                   evaluation samples, one JSON object a line
checkpoints/<fingerprint>/samples.md                      those of the latest evaluation, as a table
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.run import atomic
from pipeline.training.advantages import kl_k3

if TYPE_CHECKING:
    from pipeline.training.heldout import Answer
    from pipeline.training.rollout import Sampler
    from pipeline.training.update import Experience

ROLLOUTS, SAMPLES, TABLE = "rollouts", "samples.jsonl", "samples.md"
SHOWN = 8
"""Answers of an evaluation that are kept as samples."""
COLUMNS = ("prompt", "text", "reward", "score", "finish", "tokens")


def rollout_rows(
    exp: Experience, sampler: Sampler, places: Sequence[int], scores: Sequence[float], rewards: Sequence[float]
) -> list[dict[str, Any]]:
    """A rank's rollouts: their place in the data, texts, the reward model's score, the reward before it is scaled, and
    the KL to the reference (nats, k3 summed over the answer)."""
    kl = exp.packing.pad(kl_k3(exp.logprobs, exp.reference)).double().sum(dim=1).tolist()
    return [
        {
            "row": place,
            "prompt": sampler.tokenizer.decode(response.prompt),
            "text": sampler.scoring.text(response),
            "score": score,
            "reward": reward,
            "kl": nats,
            "finish": response.finish,
            "tokens": len(response.tokens),
        }
        for place, response, score, reward, nats in zip(places, exp.responses, scores, rewards, kl, strict=True)
    ]


def write_rollouts(folder: Path, phase: int, step: int, ranks: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Write a phase's rollouts, of all ranks; sampled again after a resume, they take the place of the earlier ones."""
    # Escaped, as json does by itself: some characters of a text would count as the end of a line.
    rows = [{"step": step, "phase": phase, **row} for rank in ranks for row in rank]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    atomic.write_text(folder / ROLLOUTS / _name(phase), text)


def drop_rollouts_from(folder: Path, phase: int) -> None:
    """Remove what was recorded of `phase` and later ones: they will be sampled again."""
    for path in (folder / ROLLOUTS).glob("phase-*.jsonl"):
        if path.name >= _name(phase):
            path.unlink()


def write_samples(folder: Path, step: int, answers: Sequence[Answer]) -> None:
    """Append an evaluation's samples, and show them as a table."""
    for answer in answers:
        atomic.append_line(folder / SAMPLES, json.dumps({"step": step, **answer.plain()}))
    atomic.write_text(folder / TABLE, f"# Samples at step {step}\n\n{markdown_table(answers)}")


def markdown_table(answers: Sequence[Answer]) -> str:
    """Samples as a table in Markdown, or as TensorBoard shows it."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cell(answer.plain()[name]) for name in COLUMNS) + " |" for answer in answers]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value).strip()
    for character, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", "<br>")):
        text = text.replace(character, written)
    return text


def _name(phase: int) -> str:
    return f"phase-{phase:08d}.jsonl"
