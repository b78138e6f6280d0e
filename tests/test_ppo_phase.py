"""A whole phase: what its options do to the rewards, what the ranks say to each other, and what is logged."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from helpers_phase import TwoRanks, phases, run_phase
from helpers_ppo import HashScorer
from helpers_update import ALONE

from pipeline.training.metrics import Row
from pipeline.training.state import TrainState

START = TrainState(kl_coefficient=0.05)


def run(root: Path, scorer: HashScorer, **ppo: Any) -> Row:
    return run_phase(phases(root, ALONE, scorer, **ppo), START)[1]


def test_the_ranks_exchange_eight_times_a_phase_however_many_steps_it_has(tmp_path: Path) -> None:
    """Whether to stop; the scores; the phase's figures; rollouts and waits; the sampler's gap; the minibatches' tokens;
    the steps' sums; and the memory."""
    for epochs in (1, 4):
        ranks = TwoRanks()
        run_phase(phases(tmp_path, ranks, HashScorer(), ppo_epochs=epochs), START)
        assert ranks.said == ["sum", *["gather_rows"] * 2, *["gather"] * 2, "sum", "gather_rows", "gather"]


def test_whitening_and_an_early_end_cost_one_exchange_more_each(tmp_path: Path) -> None:
    ranks = TwoRanks()
    trainer = phases(tmp_path, ranks, HashScorer(), whiten_rewards=True, max_update_kl=100.0)
    run_phase(trainer, START)
    assert len(ranks.said) == 8 + 1 + 4  # once a phase, and once in each of four steps


def test_an_answer_that_reached_its_limit_pays_the_penalty(tmp_path: Path) -> None:
    plain = run(tmp_path, HashScorer(lambda ids: 3.0))
    fined = run(tmp_path, HashScorer(lambda ids: 3.0), missing_eos_penalty=2.0)
    share = plain["finished/length"]
    assert share > 0 and plain["rollout_scores/mean"] == 3.0
    assert fined["rollout_scores/mean"] == pytest.approx(3.0 - 2.0 * share)


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_groups_are_answers_to_one_prompt(tmp_path: Path, kind: str) -> None:
    scorer = HashScorer()
    row = run(tmp_path, scorer, advantage=kind, group_size=4)
    sequences = [sequence for request in scorer.requests for sequence in request]
    assert len(sequences) == 8 and len({tuple(sequence[:6]) for sequence in sequences}) <= 2
    assert len({tuple(sequence) for sequence in sequences}) > 2, "each answer has noise of its own"
    assert row["ratio_first"] == 1.0 and "values/mean" not in row


def test_dense_rewards_leave_the_scores_as_they_are(tmp_path: Path) -> None:
    """The reward model's last word on each answer is the same; the values have more to learn from."""
    plain, dense = (HashScorer(), HashScorer())
    rows = [run(tmp_path, plain), run(tmp_path, dense, dense_reward_every=3)]
    assert rows[0]["rollout_scores/mean"] == rows[1]["rollout_scores/mean"]
    asked = [sum(len(request) for request in scorer.requests) for scorer in (plain, dense)]
    assert asked[0] == 8 < asked[1]
    assert rows[0]["returns/mean"] != rows[1]["returns/mean"]


def test_a_phase_logs_spreads_under_trlxs_names(tmp_path: Path) -> None:
    row = run(tmp_path, HashScorer(), ppo_epochs=1)
    for name in ("returns", "old_values", "values"):
        least, mean, greatest, std = (row[f"{name}/{kind}"] for kind in ("min", "mean", "max", "std"))
        assert least <= mean <= greatest and std >= 0.0
    assert row["old_values/std"] == 0.0 and row["returns/std"] > 0.0
    assert row["values/explained_variance"] == 0.0  # of values that are all 0
    assert (row["update/epochs"], row["update/stopped_early"], row["update/skipped"]) == (1.0, 0.0, 0.0)
    assert row["values/values_mape_error"] > 0.0 and row["grad_norm"] > 0.0
    scores = [HashScorer().score([sequence])[0] for sequence in sequences_of(tmp_path)]
    assert row["rollout_scores/std"] == pytest.approx(statistics.pstdev(scores))


def sequences_of(root: Path) -> list[list[int]]:
    """What the same phase has scored."""
    scorer = HashScorer()
    run(root, scorer, ppo_epochs=1)
    return [sequence for request in scorer.requests for sequence in request]
