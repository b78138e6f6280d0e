"""Changing a run's reward model: what is announced, which server serves it, and which phase it scores."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from helpers_ppo import config_of, make_run, tiny_config, tokenizer
from safetensors.torch import load_file
from transformers import GPTNeoXForSequenceClassification

from pipeline import serve
from pipeline.config.load import dump
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run import atomic, reward_models
from pipeline.run.directory import Artifact, Outputs, RunDir
from pipeline.serving import service, swap
from pipeline.serving.convert import convert
from pipeline.serving.scorer import BatchScorer
from pipeline.serving.service import Service
from pipeline.serving.texts import open_texts
from pipeline.training import ppo
from pipeline.training.metrics import Row, read_rows
from pipeline.training.ranks import Ranks
from pipeline.training.reward_source import LEDGER, RewardSource
from pipeline.training.trainer import Trainer, TrainState


class FakeSupervisor:
    """A server that is up when the test says so."""

    def __init__(self, identity: str, before_publishing: Callable[[], None], log: list[str]) -> None:
        self.identity, self.log = identity, log
        self._before_publishing = before_publishing
        self.up = False
        self.fault: str | None = None
        self.loads = True
        self.idle_s = 0.0
        self.restarts = 0
        self.triton_host = f"unix:/{identity}"

    def start(self, wait: bool = True) -> None:
        self.log.append(f"start {self.identity}")

    def tick(self) -> None:
        if self.fault is not None:
            raise UserError(self.fault)
        if self.loads and not self.up:
            self._before_publishing()
            self.up = True

    def retire(self) -> None:
        self.log.append(f"retire {self.identity}")

    def reinstate(self) -> None:
        self.log.append(f"reinstate {self.identity}")

    def stop(self) -> None:
        self.log.append(f"stop {self.identity}")
        self.up = False


class Story:
    """A run that converted model "a", its service, and a clock that the test moves."""

    def __init__(self, root: Path) -> None:
        self.run = RunDir(root)
        self.now = 0.0
        self.log: list[str] = []
        self.servers: dict[str, FakeSupervisor] = {}
        converted(self.run, "a", self.store("a"))
        self.service = Service(self.run, self._make, lambda: self.now)
        self.service.start(wait=False)
        self.tick()

    def store(self, name: str) -> Path:
        path = self.run.root / "stores" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _make(self, store: Path, before_publishing: Callable[[], None]) -> Any:
        self.servers[store.name] = FakeSupervisor(store.name, before_publishing, self.log)
        return self.servers[store.name]

    def tick(self, count: int = 1) -> None:
        for _ in range(count):
            self.now += 1.0
            self.service.tick()


def converted(run: RunDir, identity: str, store: Path) -> None:
    artifacts = {"model_store": Artifact(str(store), "0", 0)}
    run.write_outputs(Outputs("convert", "f", 1, artifacts, {"identity": identity}))


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path)


def test_the_latest_announcement_counts_while_the_run_has_the_model_that_it_was_made_for(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert reward_models.expected(run) is None
    converted(run, "a", tmp_path)
    assert (reward_models.expected(run), reward_models.store_of(run)) == ("a", tmp_path)
    reward_models.announce(run, "b", tmp_path / "b")
    with pytest.raises(UserError, match="the announced model store is gone"):
        reward_models.store_of(run)
    latest = reward_models.announce(run, "c", tmp_path)
    assert (reward_models.expected(run), latest.number) == ("c", 2)
    reward_models.fail(run, latest, "out of memory")
    assert (reward_models.expected(run), reward_models.fault(run, latest)) == ("b", "out of memory")
    converted(run, "d", tmp_path)
    assert reward_models.expected(run) == "d"


def test_the_new_server_takes_over_and_the_old_one_stays_for_those_who_use_it(story: Story) -> None:
    reward_models.use(story.run, "a")
    reward_models.announce(story.run, "b", story.store("b"))
    story.tick()
    story.servers["b"].loads = False
    assert story.log == ["start a", "start b"]
    story.tick(5)
    assert story.service.identity == "a"
    story.servers["b"].loads = True
    story.tick()
    assert story.log[2:] == ["retire a"]
    assert (story.service.identity, story.service.triton_host) == ("b", "unix:/b")
    story.servers["a"].idle_s = service.LINGER_S + 1
    story.tick()
    assert story.log[3:] == []  # the training may be between two requests
    reward_models.use(story.run, "b")
    story.servers["a"].idle_s = 1.0
    story.tick()
    assert story.log[3:] == []  # somebody else asked it just now
    story.servers["a"].idle_s = service.LINGER_S + 1
    story.tick(3)
    assert story.log[3:] == ["stop a"]
    story.service.stop()
    assert story.log[4:] == ["stop b"]


def third_model(story: Story) -> None:
    """The training is scored by "a", "b" is served beside it for long, and "c" is announced."""
    reward_models.use(story.run, "a")
    reward_models.announce(story.run, "b", story.store("b"))
    story.tick(2)
    story.servers["b"].idle_s = service.LINGER_S + 1
    reward_models.announce(story.run, "c", story.store("c"))


def test_a_third_model_takes_the_place_of_the_second_that_no_training_has_come_to_use(story: Story) -> None:
    third_model(story)
    story.tick(int(service.SETTLE_S))
    assert story.log == ["start a", "start b", "retire a"]  # a training may be about to change to "b"
    story.tick(2)
    assert story.log[3:5] == ["reinstate a", "stop b"]
    story.tick(2)
    assert story.log[5:] == ["start c", "retire a"]
    assert story.service.identity == "c" and story.service.up
    reward_models.use(story.run, "c")
    story.servers["a"].idle_s = service.LINGER_S + 1
    story.tick()
    assert story.log[7:] == ["stop a"]


def test_a_third_model_waits_while_the_second_is_asked_by_others(story: Story) -> None:
    third_model(story)
    story.servers["b"].idle_s = 0.0
    story.tick(20)
    assert story.log == ["start a", "start b", "retire a"]
    story.servers["b"].idle_s = service.LINGER_S + 1
    story.tick(3)
    assert story.log[3:] == ["reinstate a", "stop b", "start c", "retire a"]


def test_a_third_model_waits_until_the_first_ones_server_has_ended_where_the_training_uses_the_second(
    story: Story,
) -> None:
    third_model(story)
    reward_models.use(story.run, "b")
    story.tick(20)
    assert story.log == ["start a", "start b", "retire a"]
    story.servers["a"].idle_s = service.LINGER_S + 1
    story.tick(3)
    assert story.log[3:] == ["stop a", "start c", "retire b"]
    assert story.service.identity == "c"


def test_a_third_model_that_cannot_be_served_leaves_the_training_with_the_first_and_the_second_to_come(
    story: Story,
) -> None:
    third_model(story)
    story.tick(int(service.SETTLE_S) + 2)
    assert story.log[3:] == ["reinstate a", "stop b", "start c"]
    story.servers["c"].fault = "out of memory"
    story.tick(4)
    assert story.log[6:] == ["stop c", "start b", "retire a"]


def test_the_first_model_announced_again_is_served_again_though_the_second_has_its_place(story: Story) -> None:
    third_model(story)
    reward_models.announce(story.run, "a", story.store("a"))
    story.tick(int(service.SETTLE_S) + 4)
    assert story.log[3:] == ["reinstate a", "stop b"]
    assert story.service.identity == "a"


def test_a_second_model_that_still_loads_makes_room_for_a_third_at_once(story: Story) -> None:
    reward_models.announce(story.run, "b", story.store("b"))
    story.tick()
    story.servers["b"].loads = False
    story.tick(3)
    reward_models.announce(story.run, "c", story.store("c"))
    story.tick(3)
    assert story.log == ["start a", "start b", "stop b", "start c", "retire a"]


def test_a_training_that_was_killed_holds_no_server(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    reward_models.use(story.run, "a")
    reward_models.announce(story.run, "b", story.store("b"), alone=True)
    story.servers["a"].idle_s = service.LINGER_S + 1
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + reward_models.EXPIRES_S - 5)
    story.tick(3)
    assert story.log == ["start a"]
    monkeypatch.setattr(time, "time", lambda: now + reward_models.EXPIRES_S + 5)
    story.tick(3)
    assert story.log == ["start a", "stop a", "start b"]


def test_what_a_run_says_of_its_models_is_its_owners_whoever_comes_first(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        for name, say in {
            "use": lambda run: reward_models.use(run, "a"),
            "announce": lambda run: reward_models.announce(run, "b", tmp_path),
        }.items():
            run = RunDir(tmp_path / name)
            say(run)
            assert run.endpoint.parent.stat().st_mode & 0o777 == 0o700
            files = [path for path in run.endpoint.parent.rglob("*") if path.is_file()]
            assert [path.stat().st_mode & 0o777 for path in files] == [0o600]
    finally:
        os.umask(before)


def test_a_model_that_cannot_be_served_is_refused_and_the_old_one_goes_on(story: Story) -> None:
    model = reward_models.announce(story.run, "b", story.store("b"))
    story.tick()
    story.servers["b"].fault = "tritonserver ended with status 1: out of memory"
    story.tick(3)
    assert reward_models.fault(story.run, model) == "tritonserver ended with status 1: out of memory"
    assert (story.service.identity, story.log) == ("a", ["start a", "start b", "stop b"])
    reward_models.announce(story.run, "c", story.run.root / "gone")
    story.tick(3)
    assert (reward_models.expected(story.run), story.service.identity) == ("a", "a")


def test_a_model_to_be_served_alone_waits_until_the_training_has_left_the_old_one(story: Story) -> None:
    reward_models.use(story.run, "a")
    reward_models.announce(story.run, "b", story.store("b"), alone=True)
    story.tick(5)
    assert story.log == ["start a"]
    reward_models.use(story.run, "b")
    story.tick(2)
    assert story.log == ["start a", "stop a", "start b"]
    story.tick()
    assert story.service.identity == "b" and story.service.up


def test_without_a_training_a_server_in_use_is_left_to_its_clients(story: Story) -> None:
    reward_models.announce(story.run, "b", story.store("b"), alone=True)
    story.tick(3)
    assert story.log == ["start a"]
    story.servers["a"].idle_s = service.LINGER_S + 1
    story.tick(2)
    assert story.log == ["start a", "stop a", "start b"]


def test_a_retired_server_that_dies_for_good_takes_nobody_with_it(story: Story) -> None:
    reward_models.use(story.run, "a")
    reward_models.announce(story.run, "b", story.store("b"))
    story.tick(3)
    story.servers["a"].fault = "tritonserver failed 6 times in a row"
    story.tick(2)
    assert story.log[-1] == "stop a"
    assert story.service.identity == "b"


# The training's side: rewards in process, from two model stores.


@pytest.fixture
def own_process_state() -> Iterator[None]:
    """The command sets up its process: signals, repeatable kernels, accelerate's singletons."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    fresh_accelerate()


def fresh_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


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
        submit, phase = BatchScorer.submit, Trainer._phase

        def watched_submit(scorer: BatchScorer, sequences: Any) -> Any:
            self.asked.append((self.phase, scorer.identity))
            return submit(scorer, sequences)

        def watched_phase(trainer: Trainer, state: TrainState) -> TrainState | None:
            self.phase = state.phase
            after = phase(trainer, state)
            self.at_end_of.pop(state.phase, lambda: None)()
            self.phase = -1
            return after

        monkeypatch.setattr(BatchScorer, "submit", watched_submit)
        monkeypatch.setattr(Trainer, "_phase", watched_phase)

    def models(self) -> dict[int, set[str | None]]:
        """The models that were asked in each phase."""
        found: dict[int, set[str | None]] = {}
        for phase, identity in self.asked:
            if phase >= 0:
                found.setdefault(phase, set()).add(identity)
        return found


def rows(run: RunDir) -> list[Row]:
    timed = ("time/", "tokens_per_second", "reward_server/")
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in read_rows(run.metrics)]


def test_phases_change_over_whole_and_a_resume_goes_on_with_the_new_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_process_state: None
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


def test_a_training_killed_before_the_checkpoint_of_its_change_goes_on_with_the_announced_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_process_state: None
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


def test_a_training_that_fails_before_it_begins_leaves_no_word_of_its_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_process_state: None
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
