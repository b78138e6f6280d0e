"""Weights & Biases: online with a key wherever wandb keeps it, offline without one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.procs import capture
from pipeline.training import tracking

pytest.importorskip("wandb")

SERVER = "127.0.0.1:9"  # nothing listens there, and nothing may be asked
KEY = "0123456789" * 4


def python(script: str, home: Path, **environment: str) -> str:
    """What a script prints whose user has `home` and no wandb settings but these."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "NETRC"))}
    env = {**inherited, "HOME": str(home), "WANDB_BASE_URL": f"http://{SERVER}", "OMP_NUM_THREADS": "1", **environment}
    status, said = capture([sys.executable, "-c", script], env=env, timeout_s=120)
    assert status == 0, said
    return said


@pytest.mark.parametrize("place", ["nowhere", "netrc of another server", "netrc", "environment"])
def test_a_key_is_found_where_wandb_finds_it(place: str, tmp_path: Path) -> None:
    if place.startswith("netrc"):
        machine = SERVER if place == "netrc" else "api.example.org"
        (tmp_path / ".netrc").write_text(f"machine {machine}\n  login user\n  password {KEY}\n")
        (tmp_path / ".netrc").chmod(0o600)
    environment = {"WANDB_API_KEY": KEY} if place == "environment" else {}
    script = "from pipeline.training.tracking import wandb_finds_a_key\nprint('found:', wandb_finds_a_key())"
    found = place in {"netrc", "environment"}
    assert f"found: {found}" in python(script, tmp_path, WANDB_SILENT="true", **environment)


OFFLINE = """
import os
from pathlib import Path
from pipeline.config.load import resolve
from pipeline.training.ranks import make_accelerator
from pipeline.training.tracking import start_tracker, tracker_of
config = resolve({"train": {"tracker": "wandb"}})
folder = Path(os.environ["HOME"]) / "tracker"
accelerator = make_accelerator(1, tracker_of(config), folder)
start_tracker(accelerator, config, ["ppo"], folder, "a-run", "0123456789abcdef")
accelerator.log({"reward": 1.0}, step=3)
accelerator.end_training()
"""


def test_without_a_key_a_run_is_written_offline(tmp_path: Path) -> None:
    python(OFFLINE, tmp_path)
    (run,) = (tmp_path / "tracker" / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.config.load import resolve

    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train\.tracker: the package tensorboard is not installed"):
        tracking.tracker_of(resolve({"train": {"tracker": "tensorboard"}}))
    assert tracking.tracker_of(resolve({"train": {"tracker": "none"}})) is None


def test_a_tracker_is_told_what_the_training_follows_by_the_settings_names() -> None:
    from pipeline.config.load import resolve
    from pipeline.training.model_card import sections_of

    config = resolve({"train": {"method": "ilql"}, "sft": {"lr": 0.5}, "ilql": {"betas": [1, 4]}})
    sft = tracking.shown_settings(config, ["sft"])
    assert sft["sft.lr"] == 0.5 and sft["preset"] == "custom" and sft["seed"] == 1000
    assert all(name.startswith("sft.") for name in sft.keys() - {"preset", "seed"})
    assert "sft.eval_interval" not in sft  # it is not set

    ilql = tracking.shown_settings(config, sections_of("ilql"))
    assert ilql["ilql.betas"] == "[1.0, 4.0]" and ilql["model.lora.rank"] == 0 and ilql["optimizer.lr"] == 8e-6
    assert not any(name.startswith(("ppo.", "sft.")) for name in ilql) and "train.tracker" not in ilql


def test_tensorboard_holds_the_numbers_and_forgets_what_is_done_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from accelerate.state import AcceleratorState, GradientState
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from pipeline.config.load import resolve
    from pipeline.training.heldout import Answer
    from pipeline.training.ranks import make_accelerator

    config = resolve({"train": {"tracker": "tensorboard"}})
    answer = Answer(0, "Human: Hi\n\nAssistant:", " a | b", 0.25, 0.5, "eos", 3)

    def segment(steps: dict[int, float], resumed: bool) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        accelerator = make_accelerator(1, tracking.tracker_of(config), tmp_path)
        tracking.start_tracker(accelerator, config, ["ppo", "generate"], tmp_path, "a-run", "0123456789abcdef")
        if resumed:
            tracking.go_on_from(accelerator, min(steps))
        for step, reward in steps.items():
            accelerator.log({"reward/mean": reward, "reward_model": None}, step=step)
        tracking.log_samples(accelerator, [answer], max(steps))
        tracking.end_tracking(accelerator)

    segment({4: 0.5, 8: 0.75}, resumed=False)
    segment({8: 1.5, 12: 2.0}, resumed=True)  # from the checkpoint at 4
    (folder,) = (path for path in (tmp_path / config.train.project_name).iterdir())
    events = EventAccumulator(str(folder)).Reload()
    assert [(each.step, each.value) for each in events.Scalars("reward/mean")] == [(4, 0.5), (8, 1.5), (12, 2.0)]
    text = events.Tensors("samples/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert r"| Human: Hi<br><br>Assistant: | a \| b | 0.500 | 0.250 | eos | 3 |" in text
