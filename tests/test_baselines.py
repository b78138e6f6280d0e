"""The scores of the data's own answers: asked for once, kept by content, shared by runs, and never taken from a damaged
file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
from helpers_ppo import make_run, tiny_config

from pipeline.data.preferences import Preference
from pipeline.training.baselines import BLOCK, baseline_scores, content_key, read_scores, write_scores
from pipeline.training.ppo import load_data

ROWS = [Preference(f"Human: {number}\n\nAssistant:", f" answer {number}", " no") for number in range(3 * BLOCK + 5)]
ANY: Any = SimpleNamespace(max_length=64, answer=lambda prompt, answer: [ord(letter) for letter in prompt + answer])


class Sums:
    """Stands in for a scorer: the reward is the sum of the ids; counts what it is asked."""

    def __init__(self, identity: str | None = "a" * 64) -> None:
        self.identity = identity
        self.asked: list[int] = []

    def submit(self, sequences: Sequence[Sequence[int]]) -> Future[list[float]]:
        self.asked.append(len(sequences))
        future: Future[list[float]] = Future()
        future.set_result([float(sum(sequence)) / 7 for sequence in sequences])
        return future


class Alone:
    rank, world, first = 0, 1, True

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def from_first(self, value: Any) -> Any:
        return value


class Pair:
    """One of two ranks, each a thread of this process."""

    world = 2

    def __init__(self, rank: int, shared: list[Any], barrier: Barrier) -> None:
        self.rank, self.first, self.shared, self.barrier = rank, rank == 0, shared, barrier

    def gather(self, value: Any) -> list[Any]:
        self.shared[self.rank] = value
        self.barrier.wait(20)
        values = list(self.shared)
        self.barrier.wait(20)
        return values

    def from_first(self, value: Any) -> Any:
        return self.gather(value)[0]


def scored(cache: Path, scorer: Any, rows: Sequence[int] = range(len(ROWS)), ranks: Any = None) -> dict[int, float]:
    return baseline_scores(cache, ROWS, rows, ANY, scorer, ranks or Alone(), lambda _note: None)


def expected(rows: Sequence[int] = range(len(ROWS))) -> dict[int, float]:
    return {row: sum(map(ord, ROWS[row].prompt + ROWS[row].chosen)) / 7 for row in rows}


@pytest.mark.parametrize(("advantage", "asked"), [("gae", {"train", "test"}), ("rloo", {"test"})])
def test_training_prompts_baselines_are_not_asked_for_where_they_cancel(
    advantage: str, asked: set[str], tmp_path: Path
) -> None:
    ppo = {"num_rollouts": 4, "chunk_size": 4, "advantage": advantage, "group_size": 2, "scale_reward": "none"}
    config = tiny_config(ppo={**ppo, "cliprange_reward": None})
    run = make_run(tmp_path, config)
    scorer, progress = Sums(), SimpleNamespace(update=lambda step, note: None)
    sampler: Any = SimpleNamespace(scoring=ANY, scorer=scorer)

    data = load_data(run, config, sampler, Alone(), progress)  # type: ignore[arg-type]

    found = {"train": data.train_baselines, "test": data.heldout_baselines}
    assert {name for name, scores in found.items() if scores is not None} == asked
    assert (
        found["test"] == {row: sum(map(ord, each.prompt + each.chosen)) / 7 for row, each in enumerate(data.heldout)}
        and len(data.heldout) == 4
    )  # train.eval_prompts
    assert sum(scorer.asked) == sum(len(scores) for scores in found.values() if scores is not None)


def files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.json"))


def test_what_was_scored_is_not_asked_for_again_not_even_by_a_run_with_other_rows(tmp_path: Path) -> None:
    first, again = Sums(), Sums()
    assert scored(tmp_path, first) == expected()
    assert first.asked == [BLOCK, BLOCK, BLOCK, 5]
    assert scored(tmp_path, again, [9, 3, 9, 77]) == expected([9, 3, 77])
    assert again.asked == []


def test_a_block_that_is_known_in_part_is_asked_for_whole_so_that_its_scores_are_those_of_a_first_run(
    tmp_path: Path,
) -> None:
    scored(tmp_path, Sums(), range(BLOCK + 10))
    again = Sums()
    assert scored(tmp_path, again) == expected()
    assert again.asked == [BLOCK, BLOCK, 5]


@pytest.mark.parametrize("identity", ["b" * 64, None])
def test_another_model_or_one_without_a_name_is_asked(identity: str | None, tmp_path: Path) -> None:
    scored(tmp_path, Sums())
    other = Sums(identity)
    scored(tmp_path, other)
    assert sum(other.asked) == len(ROWS)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data.replace(b"1", b"2", 1),
        lambda data: b"[]",
        lambda data: data.replace(b'"model":"a', b'"model":"c'),
    ],
)
def test_a_damaged_file_is_told_of_and_scored_again(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scored(tmp_path, Sums())
    (path,) = files(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    again = Sums()
    with caplog.at_level(logging.WARNING):
        assert scored(tmp_path, again) == expected()
    assert sum(again.asked) == len(ROWS)
    assert f"{path}: removed, it is damaged" in caplog.text
    assert scored(tmp_path, Sums()) == expected()
    assert len(files(tmp_path)) == 1


def test_ranks_share_the_work_and_ask_the_same_requests_as_one(tmp_path: Path) -> None:
    shared: list[Any] = [None, None]
    barrier, both = Barrier(2), (Sums(), Sums())
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(scored, tmp_path, both[rank], ranks=Pair(rank, shared, barrier)) for rank in range(2)]
        assert [run.result(60) for run in runs] == [expected(), expected()]
    assert (both[0].asked, both[1].asked) == ([BLOCK, BLOCK], [BLOCK, 5])
    assert len(files(tmp_path)) == 2
    alone = Sums()
    assert scored(tmp_path, alone) == expected()
    assert alone.asked == []


def test_runs_may_write_to_one_folder_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        runs = [threads.submit(scored, tmp_path, Sums(), range(start, 150)) for start in (0, 0, 20, 40)]
        assert [run.result(60) for run in runs] == [expected(range(start, 150)) for start in (0, 0, 20, 40)]
    alone = Sums()
    scored(tmp_path, alone, range(150))
    assert alone.asked == []


def test_scores_of_a_long_work_are_kept_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.baselines._BLOCKS_A_FILE", 1)
    monkeypatch.setattr("pipeline.training.baselines._AHEAD", 0)
    scorer = Sums()

    def interrupted() -> Iterator[None]:
        yield
        raise KeyboardInterrupt

    steps = interrupted()
    with pytest.raises(KeyboardInterrupt):
        baseline_scores(tmp_path, ROWS, range(len(ROWS)), ANY, scorer, Alone(), lambda _note: next(steps))  # type: ignore[arg-type]
    again = Sums()
    assert scored(tmp_path, again) == expected()
    assert again.asked == [BLOCK, 5]


def test_a_score_survives_the_disk_to_the_last_bit_and_depends_on_every_id(tmp_path: Path) -> None:
    write_scores(tmp_path, "a" * 64, {content_key([1, 2]): 0.1 + 0.2})
    assert read_scores(tmp_path, "a" * 32) == {content_key([1, 2]): 0.1 + 0.2}
    assert len({content_key(ids) for ids in ([1, 2], [2, 1], [1], [1, 2, 0], [12], [])}) == 6
