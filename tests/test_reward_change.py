"""A training whose reward model changes: which phase which model scores, and what a resume makes of it."""

from __future__ import annotations

import atexit
import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_ppo import config_of, make_run, tiny_config, tokenizer
from helpers_process import fresh_accelerate, own_process_state  # noqa: F401
from helpers_swap import converted
from safetensors.torch import load_file
from transformers import GPTNeoXForSequenceClassification

from pipeline import serve
from pipeline.config.load import dump
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run import atomic, reward_models
from pipeline.run.directory import RunDir
from pipeline.serving import swap
from pipeline.serving.convert import convert
from pipeline.serving.scorer import BatchScorer
from pipeline.serving.texts import open_texts
from pipeline.training import ppo
from pipeline.training.metrics import Row, read_rows
from pipeline.training.open_phase import OpenPhase
from pipeline.training.phase import Phases
from pipeline.training.ranks import Ranks
from pipeline.training.reward_source import LEDGER, RewardSource
from pipeline.training.state import TrainState
from pipeline.training.trainer import Trainer


def settings() -> Config:
    train = {**tiny_config().train.model_dump(), "num_processes": 1, "total_steps": 8, "checkpoint_interval": 100}
    return tiny_config(train=train)


def two_models(root: Path) -> tuple[RunDir, Path]:
    """A run that has converted its reward model, and the store of another one."""
    shutil.copytree(two_models_made(), root, dirs_exist_ok=True)
    return RunDir(root), root / "other_store"


@lru_cache(maxsize=1)
def two_models_made() -> Path:
    """The same, made once."""
    root, config = Path(tempfile.mkdtemp()), settings()
    atexit.register(shutil.rmtree, root)
    run = make_run(root, config)
    store = root / "stages/convert/out/model_store"
    manifest = convert(run.artifact("reward-model", "model"), store, config.serving)
    converted(run, manifest.identity, store.relative_to(root))
    other = root / "other"
    torch.manual_seed(2)
    shape = config_of("gpt_neox")
    shape.num_labels, shape.pad_token_id = 1, 1
    GPTNeoXForSequenceClassification(shape).save_pretrained(other)
    tokenizer().save_pretrained(other)
    convert(other, root / "other_store", config.serving)
    return root


def train(run: RunDir, out: str) -> int:
    fresh_accelerate()
    return ppo.main(["--run", str(run.root), "--out", str(run.root / out)])


class Watched:
    """Which model each call went to, by phase; and something that happens at the end of a phase."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[int, str | None]] = []
        self.phase = -1
        self.at_end_of: dict[int, Callable[[], object]] = {}
        submit, begin, finish = BatchScorer.submit, Phases.begin, Trainer._finish

        def watched_submit(scorer: BatchScorer, sequences: Any) -> Any:
            self.asked.append((self.phase, scorer.identity))
            return submit(scorer, sequences)

        def watched_begin(phases: Phases, state: TrainState) -> OpenPhase | None:
            self.phase = state.phase
            return begin(phases, state)

        def watched_finish(trainer: Trainer, phase: OpenPhase) -> TrainState:
            state = finish(trainer, phase)
            self.at_end_of.pop(self.phase, lambda: None)()
            self.phase = -1
            return state

        monkeypatch.setattr(BatchScorer, "submit", watched_submit)
        monkeypatch.setattr(Phases, "begin", watched_begin)
        monkeypatch.setattr(Trainer, "_finish", watched_finish)

    def models(self) -> dict[int, set[str | None]]:
        """The models that were asked in each phase."""
        found: dict[int, set[str | None]] = {}
        for phase, identity in self.asked:
            if phase >= 0:
                found.setdefault(phase, set()).add(identity)
        return found


def rows(run: RunDir) -> list[Row]:
    timed = ("time/", "tokens_per_second", "samples_per_second", "tflops", "memory/", "reward_server/")
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in read_rows(run.metrics)]


@pytest.mark.usefixtures("own_process_state")
def test_phases_change_over_whole_and_a_resume_goes_on_with_the_new_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One training that is let be, and one that is stopped in the first phase of the new model and started again."""
    ends: list[tuple[list[Row], dict[str, torch.Tensor]]] = []
    for stopped in (False, True):
        run, store = two_models(tmp_path / str(stopped))
        a = str(run.values("convert")["identity"])
        watched = Watched(monkeypatch)
        config = settings()

        def change(run: RunDir = run, config: Config = config, store: Path = store) -> None:
            swap.announce(run, config, store, False, lambda text: None)

        watched.at_end_of[1] = change
        if stopped:
            run.stop_flag.parent.mkdir(parents=True)
            watched.at_end_of[2] = run.stop_flag.touch
            assert train(run, "first") == 75
            assert reward_models.in_use(run) is None
            run.stop_flag.unlink()
        assert train(run, "last") == 0
        b = reward_models.expected(run)
        assert b is not None and a != b
        assert watched.models() == {0: {a}, 1: {a}, 2: {b}, 3: {b}}
        phases = [(row["phase"], row["reward_model"]) for row in rows(run) if "phase" in row]
        assert phases == [(0, a), (1, a), (2, b), (3, b)]
        (ledger,) = run.checkpoints.glob(f"*/{LEDGER}")
        assert atomic.read_json(ledger) == [{"phase": 0, "identity": a}, {"phase": 2, "identity": b}]
        ends.append((rows(run), load_file(run.root / "last/policy/model.safetensors")))
        monkeypatch.undo()
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(ends[0][1][name], ends[1][1][name]) for name in ends[0][1])
    figures = [row for row in read_rows(run.metrics) if "phase" in row]
    assert [row["reward_server/sequences"] for row in figures] == [4, 4, 4, 4]  # without those of evaluations
    assert all(
        0.0 <= row["reward_server/wire_padding"] < 1.0 and row["reward_server/tokens_per_second"] > 0 for row in figures
    )
    changed = next(row for row in ends[0][0] if row.get("phase") == 2)
    # Two scores of one model, not six of two: moments of scores that do not compare are not mixed.
    assert changed["rollout_scores/running_mean"] == pytest.approx(changed["rollout_scores/mean"])


@pytest.mark.usefixtures("own_process_state")
def test_a_training_killed_before_the_checkpoint_of_its_change_goes_on_with_the_announced_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = two_models(tmp_path)
    watched = Watched(monkeypatch)
    watched.at_end_of[1] = lambda: swap.announce(run, settings(), store, False, lambda text: None)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.training.checkpoint.seal", die)
    with pytest.raises(KeyboardInterrupt):
        train(run, "first")
    monkeypatch.undo()
    watched = Watched(monkeypatch)
    assert train(run, "last") == 0
    assert watched.models() == {phase: {reward_models.expected(run)} for phase in range(4)}


def test_a_store_that_does_not_fit_the_run_is_refused(tmp_path: Path) -> None:
    run, store = two_models(tmp_path)
    config = settings()
    ours = reward_models.store_of(run)
    with pytest.raises(UserError, match=r"is the reward model that .* uses already"):
        swap.announce(run, config, ours, False, print)
    longer = settings().model_copy(update={"serving": config.serving.model_copy(update={"max_length": 500})})
    with pytest.raises(UserError, match=r"scores at most 96 tokens, but the run's serving\.max_length is 500"):
        swap.announce(run, longer, store, False, print)
    rounded = settings().model_copy(update={"serving": config.serving.model_copy(update={"dtype": "bfloat16"})})
    with pytest.raises(UserError, match=r"computes in float32, but the run's serving\.dtype is bfloat16"):
        swap.announce(run, rounded, store, False, print)
    (file,) = store.glob("*/1/reward_model/tokenizer.json")
    file.write_text(file.read_text().replace('"Ġ', '"Q', 1))
    with pytest.raises(UserError, match="has another tokenizer than the run's reward model"):
        swap.announce(run, config, store, False, print)
    assert reward_models.announced(run) is None


def source_of(run: RunDir) -> RewardSource:
    atomic.write_text(run.config, dump(settings()))
    return RewardSource(run, settings(), run.root / LEDGER, Ranks(0, 1, torch.device("cpu")))


def test_a_server_named_by_the_environment_is_never_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, store = two_models(tmp_path)
    with contextlib.closing(source_of(run)) as source:
        scorer = source.connect()
        a = scorer.identity
        swap.announce(run, settings(), store, False, print)
        monkeypatch.setenv("TRITON_HOST", "127.0.0.1:9/reward-model")
        assert source.announced(scorer) is None and reward_models.in_use(run) == a
        monkeypatch.delenv("TRITON_HOST")
        # Who decides for a model says so at once: its server must not make room for a third one.
        assert source.announced(scorer) == reward_models.expected(run) == reward_models.in_use(run) != a


def test_a_training_says_again_and_again_which_model_it_uses_until_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_models, "RENEW_S", 0.01)
    run, _ = two_models(tmp_path)
    with contextlib.closing(source_of(run)) as source:
        identity = source.connect().identity
        for _ in range(2):
            reward_models.release(run)
            deadline = time.monotonic() + 60
            while reward_models.in_use(run) != identity:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    time.sleep(0.05)
    assert reward_models.in_use(run) is None


@pytest.mark.usefixtures("own_process_state")
def test_a_training_that_fails_before_it_begins_leaves_no_word_of_its_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = two_models(tmp_path)
    said: list[str | None] = []

    def fail(*_: object, **__: object) -> None:
        said.append(reward_models.in_use(run))
        raise UserError("no data")

    monkeypatch.setattr(ppo, "load_data", fail)
    with pytest.raises(UserError, match="no data"):
        train(run, "first")
    assert said == [reward_models.expected(run)] and reward_models.in_use(run) is None


def test_an_announced_store_that_every_user_may_change_is_not_read_in_process_either(tmp_path: Path) -> None:
    run, store = two_models(tmp_path)
    swap.announce(run, settings(), store, False, print)
    store.chmod(0o777)
    with pytest.raises(UserError, match="every user may write to it"):
        source_of(run).connect()
    with pytest.raises(UserError, match="every user may write to it"), open_texts(None, store, {}):
        pass
    with pytest.raises(UserError, match="every user may write to it"):
        serve.main(["--run", str(tmp_path), "--swap", str(store)])
    store.chmod(0o700)
