"""Evaluation: `python -m pipeline.evaluation.evaluate --run RUN --out DIR`.

Compares the trained model with what it started from, on held-out prompts, with the same sampler, and the same noise
for the same prompt. Makes the artifact "report": report.json and the page index.html.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import heavy

if __name__ == "__main__":
    heavy.begin()  # before the imports below, which take seconds

import torch
import transformers
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.data.preferences import Preference, read_split
from pipeline.data.tokens import load_tokenizer, same_vocabulary
from pipeline.errors import UserError
from pipeline.evaluation.html import render_report
from pipeline.evaluation.statistics import paired_difference, win_rate
from pipeline.run import atomic, sources
from pipeline.run.directory import RunDir
from pipeline.run.work import Progress, parse_work, write_result
from pipeline.serving.client import connect_scorer
from pipeline.serving.model_store import reward_folder
from pipeline.training.advantages import kl_k3
from pipeline.training.decode import Adjust, Response
from pipeline.training.ilql_decoding import steer
from pipeline.training.ilql_output import has_heads, load_heads
from pipeline.training.metrics import Row, read_rows
from pipeline.training.models import disable_dropout, load_causal_lm
from pipeline.training.prompts import blocks, generator_for
from pipeline.training.rollout import Sampler
from pipeline.training.scoring_text import ScoringText
from pipeline.training.split import Split, split_model
from pipeline.training.stopping import StopSequences
from pipeline.training.vocabulary import token_logprobs

if TYPE_CHECKING:
    from pipeline.serving.scorer import Scorer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """One policy's answer to one prompt."""

    text: str
    reward: float
    response: Response


def main(argv: list[str] | None = None) -> None:
    """Compare, and write the report."""
    run, config, out = parse_work(__doc__.splitlines()[0], argv)
    transformers.utils.logging.disable_progress_bar()
    preferences = read_split(run, "test")[: config.evaluate.num_prompts]
    if len(preferences) < 2:
        raise UserError(f"{run.root}: the test split has {len(preferences)} rows; an evaluation needs at least 2")
    start, trained = sources.compared_paths(run, config)
    scorer = connect_scorer(run, config)
    progress = Progress(out, 2 * len(preferences))
    try:
        report = compare(run, config, start, trained, preferences, scorer, progress)
    finally:
        scorer.close()
    atomic.write_json(out / "report" / "report.json", report)
    atomic.write_text(out / "report" / "index.html", render_report(report, training_rows(run)))
    write_result(out, {"report": "report"}, headline(report))
    logger.info("win rate %.3f, reward %+.3f", report["win_rate"], report["paired"]["mean"])


def training_rows(run: RunDir) -> list[Row]:
    """The metrics of the training that made the policy, or the SFT model; the link at the top may be a later one's."""
    values = run.values("train") or run.values("sft")
    return read_rows(run.root / values.get("metrics", run.metrics.name))


def compare(
    run: RunDir,
    config: Config,
    start: Path,
    trained: Path,
    preferences: Sequence[Preference],
    scorer: Scorer,
    progress: Progress,
) -> dict[str, Any]:
    """Sample from both, score, and put the report together."""
    tokenizer = load_tokenizer(trained)
    rewards_from = reward_folder(run, config)
    scoring = ScoringText(
        policy=tokenizer,
        reward=load_tokenizer(rewards_from),
        same_vocabulary=same_vocabulary(trained, rewards_from),
        stops=StopSequences(tokenizer, config.generate.stop_sequences),
        max_length=config.serving.max_length,
    )
    chosen = score_answers(preferences, scoring, scorer, config.evaluate.batch_size)

    def ask(path: Path, done: int, judged: Sequence[Response] | None = None) -> tuple[list[Answer], Tensor]:
        """A model's answers, and what it says of the `judged` ones (None: of its own). It is gone when that is known:
        two of the largest have no room on one GPU."""
        split = load_split(path, config)
        adjust = load_steering(path, split) if path == trained else None
        sampler = Sampler(
            split,
            tokenizer,
            scoring,
            scorer,
            config.generate,
            config.prompt_length,
            contextlib.nullcontext,
            adjust=adjust,
        )
        report = lambda count: progress.update(done + count, "sampling")  # noqa: E731
        answers = sample_answers(sampler, preferences, config.evaluate.batch_size, config.seed, report)
        return answers, all_logprobs(split, judged or [answer.response for answer in answers], config, adjust)

    policy, ours = ask(trained, 0)
    responses = [answer.response for answer in policy]
    sft, theirs = ask(start, len(preferences), responses)
    return build_report(run, config, preferences, sft, policy, chosen, mean_kl(ours, theirs, len(responses)))


def load_split(path: Path, config: Config) -> Split:
    """The model at `path` on this process's device: float32 on a CPU, bf16 on a GPU."""
    on_gpu = torch.cuda.is_available()
    model = load_causal_lm(path, torch.bfloat16 if on_gpu else torch.float32)
    disable_dropout(model)
    return split_model(model.to("cuda" if on_gpu else "cpu"), config.model.num_layers_unfrozen)


def score_answers(
    preferences: Sequence[Preference], scoring: ScoringText, scorer: Scorer, batch_size: int
) -> list[float]:
    """The rewards of the data set's chosen answers."""
    sequences = [scoring.answer(preference.prompt, preference.chosen) for preference in preferences]
    futures = [scorer.submit([sequences[i] for i in rows]) for rows in blocks(range(len(sequences)), batch_size)]
    return [score for future in futures for score in future.result()]


def sample_answers(
    sampler: Sampler, preferences: Sequence[Preference], batch_size: int, seed: int, report: Callable[[int], None]
) -> list[Answer]:
    """One scored answer a prompt. A prompt's noise depends on the seed and its place alone, not on the policy."""
    chunks = []
    for number, rows in enumerate(blocks(range(len(preferences)), batch_size)):
        generator = generator_for(sampler.split.device, seed, "evaluate", number)
        responses, pending = sampler.sample([preferences[row].prompt for row in rows], generator)
        # The states at the cut are training's; of all answers together they take more room than a batch's cache.
        chunks.append(([replace(response, states=response.states[:0].clone()) for response in responses], pending))
        report(rows[-1] + 1)
    return [
        Answer(sampler.scoring.text(response), score, response)
        for responses, pending in chunks
        for response, score in zip(responses, pending.result(), strict=True)
    ]


def load_steering(folder: Path, split: Split) -> Adjust | None:
    """What a policy that ILQL trained decodes with, beside its language model; None for any other."""
    if not has_heads(folder):
        return None
    _, targets, beta = load_heads(folder)
    return steer(targets.to(split.device), beta, split.whole.dtype)


def mean_kl(ours: Tensor, theirs: Tensor, responses: int) -> float:
    """KL(policy || start) in nats per response, by k3, from both models' log-probabilities (n,) of all tokens of the
    policy's own samples."""
    return float(kl_k3(ours, theirs).double().sum()) / responses


def all_logprobs(split: Split, responses: Sequence[Response], config: Config, adjust: Adjust | None = None) -> Tensor:
    """`response_logprobs` of any number of responses, (n,) on the host."""
    parts = []
    for rows in blocks(range(len(responses)), config.evaluate.batch_size):
        batch = [responses[row] for row in rows]
        parts.append(response_logprobs(split, batch, config.generate.temperature, adjust).cpu())
    return torch.cat(parts)


@torch.no_grad()
def response_logprobs(
    split: Split, responses: Sequence[Response], temperature: float, adjust: Adjust | None = None
) -> Tensor:
    """Log-probabilities of all responses' tokens, one after the other (n,), by a forward of the whole model.

    With `adjust`, those of the scores that it makes, as the responses were sampled.
    """
    inputs = [torch.tensor(response.prompt + response.tokens[:-1]) for response in responses]
    ids = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(split.device)  # (B, T)
    hidden = split.top.part(split.trunk(ids))  # (B, T, H); right padding is hidden by causality
    parts = []
    for row, response in enumerate(responses):
        first = len(response.prompt) - 1
        states = hidden[row, first : first + len(response.tokens)]
        targets = torch.tensor(response.tokens, device=split.device)
        if adjust is None:
            parts.append(token_logprobs(split.top.head, states, targets, temperature, False)[0])
        else:
            scores = adjust(split.top.head(states), states) / temperature
            parts.append(scores.log_softmax(dim=-1).gather(-1, targets[:, None]).squeeze(-1))
    return torch.cat(parts)


def build_report(
    run: RunDir,
    config: Config,
    preferences: Sequence[Preference],
    sft: Sequence[Answer],
    policy: Sequence[Answer],
    chosen: Sequence[float],
    kl: float,
) -> dict[str, Any]:
    """The report as plain JSON types."""
    before, after = [answer.reward for answer in sft], [answer.reward for answer in policy]
    samples = [
        {
            "prompt": preferences[i].prompt,
            "sft": sft[i].text,
            "sft_reward": before[i],
            "policy": policy[i].text,
            "policy_reward": after[i],
            "chosen": preferences[i].chosen,
            "chosen_reward": chosen[i],
        }
        for i in range(min(config.evaluate.num_samples, len(preferences)))
    ]
    generate = config.generate
    return {
        "sft": _side(sft, chosen),
        "policy": _side(policy, chosen),
        "paired": asdict(paired_difference(before, after)),
        "win_rate": win_rate(before, after),
        "kl": kl,
        "samples": samples,
        "reward_model": run.values("reward-model"),
        "names": names(config),
        "config": {
            "preset": config.preset,
            "seed": config.seed,
            "model": config.model.path,
            "prompts": len(preferences),
            "max_new_tokens": generate.max_new_tokens,
            "temperature": generate.temperature,
            "top_k": generate.top_k,
            "top_p": generate.top_p,
        },
    }


def names(config: Config) -> dict[str, str]:
    """What the two sides are, for people."""
    if "train" not in config.all:
        return {"sft": "Base model", "policy": "SFT model"}
    start = "SFT start" if "sft" in config.all else "Start"
    return {"sft": start, "policy": f"{config.train.method.upper()} policy"}


def headline(report: dict[str, Any]) -> dict[str, Any]:
    """The numbers that the stage records."""
    return {
        "reward_sft": report["sft"]["reward_mean"],
        "reward_policy": report["policy"]["reward_mean"],
        "delta_sft": report["sft"]["delta_mean"],
        "delta_policy": report["policy"]["delta_mean"],
        "paired": report["paired"],
        "win_rate": report["win_rate"],
        "kl": report["kl"],
        "prompts": report["paired"]["n"],
    }


def _side(answers: Sequence[Answer], chosen: Sequence[float]) -> dict[str, float]:
    return {
        "reward_mean": statistics.fmean(answer.reward for answer in answers),
        "delta_mean": statistics.fmean(answer.reward - base for answer, base in zip(answers, chosen, strict=True)),
        "length_mean": statistics.fmean(len(answer.response.tokens) for answer in answers),
        "ended": statistics.fmean(answer.response.finish != "length" for answer in answers),
    }


if __name__ == "__main__":
    heavy.run_and_leave(main)
