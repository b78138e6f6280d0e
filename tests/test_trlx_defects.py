"""Defects of trlX's HH example (docs/algorithms.md lists ten) that touch PPO's arithmetic, and their absence here.

One small check a defect, on numbers from elsewhere: enumeration, or by hand. The others are in
tests/test_triton_server.py and tests/test_chain.py (server and process, one interface and the same rewards in every
method), tests/test_serving_store.py (checkpoints are loaded strictly), tests/test_split_model.py (the reference),
tests/test_checkpoint_resume.py (the result is an ordinary model) and tests/test_evaluate_command.py (one way to
evaluate).
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_phase import ROWS, TwoRanks, phases, run_phase
from helpers_ppo import HashScorer, tiny_model
from helpers_update import ALONE, LENGTHS, SCORES, phase, settings

from pipeline.training.control import KLController
from pipeline.training.decode import Response
from pipeline.training.figures import phase_figures
from pipeline.training.microbatches import Limits
from pipeline.training.prompts import phase_prompts
from pipeline.training.split import split_model
from pipeline.training.state import TrainState
from pipeline.training.update import targets_of


def test_4_rewards_are_deltas_whoever_computes_them(tmp_path: Path) -> None:
    """trlX subtracts the data set's answer in process only. Here the trainer does, behind whatever scorer there is."""
    baselines = {row: float(row) for row in range(len(ROWS))}
    ran = run_phase(
        phases(tmp_path, ALONE, HashScorer(lambda ids: 3.0), baselines, cliprange_reward=100.0),
        TrainState(kl_coefficient=0.05),
    )
    sampled = phase_prompts(0, 0, 1, 8, len(ROWS), seed=1000)
    assert ran[1]["rollout_scores/mean"] == pytest.approx(3.0 - sum(sampled) / 8)


def test_5_the_controller_counts_all_ranks_rollouts_once_a_phase(tmp_path: Path) -> None:
    """trlX's counts one rank's batch, once an inner epoch. Two ranks of eight rollouts, whose KL is 0 at first:"""
    trainer = phases(tmp_path, TwoRanks(), HashScorer(), target=6.0)
    first = run_phase(trainer, TrainState(kl_coefficient=0.05))
    state, row = first
    assert row["policy/kl"] == 0.0 and state.kl_coefficient == pytest.approx(0.05 * (1 - 0.2 * 16 / 100), rel=1e-12)
    second = run_phase(trainer, state)
    by_hand = state.kl_coefficient * (1 + min(max(second[1]["policy/kl"] / 6.0 - 1, -0.2), 0.2) * 16 / 100)
    assert second[0].kl_coefficient == pytest.approx(by_hand, rel=1e-12)
    assert second[0].rollouts == 32 and KLController(0.05, None, 100).updated(9.0, 16).coefficient == 0.05


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_6_the_score_is_on_the_last_sampled_token_of_every_length(gamma: float) -> None:
    """trlX puts it one or two slots behind, on masked positions, for all but a chunk's longest answer."""
    exp = phase(split_model(tiny_model(spread=3.0), 1), Limits(4))[3]
    targets = targets_of(exp, SCORES, 0.0, settings(gamma=gamma, lam=1.0), ALONE)
    for score, returns in zip(SCORES, torch.split(targets.returns, exp.packing.lengths), strict=True):
        expected = [score * gamma**left for left in range(len(returns) - 1, -1, -1)]
        assert returns.tolist() == pytest.approx(expected, abs=1e-6)
    assert exp.packing.lengths == LENGTHS and len(set(LENGTHS)) > 4


@pytest.mark.parametrize("prompt", [1, 50], ids=["short-prompt", "long-prompt"])
def test_7_the_kl_is_that_of_the_policy_to_the_reference_and_leaves_the_prompt_out(prompt: int) -> None:
    """By enumeration: answers of one token, as often as a policy of 1/2, 3/10, 1/5 samples them."""
    policy, reference = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]
    sampled = [0] * 5 + [1] * 3 + [2] * 2
    ours, theirs = (torch.tensor([math.log(table[token]) for token in sampled]) for table in (policy, reference))
    states = torch.zeros(prompt, 1)
    answers = [
        Response(row, [9] * prompt, [token], "eos", states, ours[row : row + 1]) for row, token in enumerate(sampled)
    ]
    noise = torch.rand(4, 10)
    figures, _ = phase_figures(answers, ours, theirs, *noise, ALONE)
    exact = sum(p * math.log(p / q) for p, q in zip(policy, reference, strict=True))
    assert figures["policy/kl"] == pytest.approx(exact, rel=1e-6)
    assert figures["policy/kl_per_token"] == pytest.approx(exact, rel=1e-6)
    wrong_sign = sum(p * (p / q - 1 - math.log(p / q)) for p, q in zip(policy, reference, strict=True))
    assert abs(wrong_sign - exact) > 0.04  # what trlX estimates


def test_7_the_kl_of_several_tokens_is_summed_over_an_answer_and_averaged_over_answers() -> None:
    exp = phase(split_model(tiny_model(spread=3.0), 1), Limits(4))[3]
    moved = replace(exp, reference=exp.logprobs - 0.5)
    figures = targets_of(moved, SCORES, 0.05, settings(), ALONE).figures
    each = math.exp(-0.5) - 1 + 0.5
    assert figures["policy/kl"] == pytest.approx(each * sum(LENGTHS) / len(LENGTHS), rel=1e-5)
    assert figures["policy/kl_per_token"] == pytest.approx(each, rel=1e-5)
