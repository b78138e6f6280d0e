"""The benchmarks run at a tiny size, and both of their sides do the same work."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("[!_]*.py") if path.stem != "trl_worker")
SMALL = ["--rollouts", "4", "--new-tokens", "6", "--rounds", "1"]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules beside each other, as where they are scripts; what they set for themselves does not stay."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads, disabled = torch.get_num_threads(), logging.root.manager.disable
    yield
    torch.set_num_threads(threads)
    logging.disable(disabled)


def script(name: str) -> Any:
    """A benchmark's module."""
    return importlib.import_module(name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_what_it_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        script(name).main(["--help"])
    assert ended.value.code == 0
    assert "--" in capsys.readouterr().out


def test_an_iteration_samples_all_tokens_whatever_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    iteration = script("ppo_iteration")
    options = ["--shape", "tiny", "--batch-size", "2", "--epochs", "2", "--threads", "1", *SMALL]
    reports = iteration.measure(iteration.parse(options))
    assert {work: [one["tokens"] for one in several] for work, several in reports.items()} == {
        work: [4 * 6] for work in ("top", "critic", "all")
    }
    assert 0 < reports["top"][0]["score"] < 1
    iteration.show({"TRL": [{**reports["top"][0], "seconds": 10 * reports["top"][0]["seconds"]}], **reports})
    assert "10.000" in capsys.readouterr().out


def test_the_reward_is_the_mean_worth_of_prompt_and_answer() -> None:
    iteration = script("ppo_iteration")
    period = iteration.PERIOD
    assert iteration.token_reward([3, period + 5, 0]) == pytest.approx((3 + 5) / period / 2)  # not the EOS behind them


def test_the_update_comes_to_the_same_losses_with_the_trunk_run_anew() -> None:
    update = script("update")
    rows = update.measure(
        update.parse(["--shape", "gptj-tiny", "--unfrozen", "1", "--batch-size", "2", "--epochs", "2", *SMALL])
    )
    assert set(rows) == {"kept", "anew"}
    assert rows["kept"][0]["losses/value_loss"] != 0
    assert update.difference(rows) < 1e-4


def test_ranks_are_compared_by_the_samples_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = script("ranks")
    options = ranks.parse(["--rollouts", "8"])
    phase = {"time/rollout_generate": 1.0, "time/train": 1.0}
    ranks.show({1: [[{**phase, "time/phase": 2.0}]], 2: [[{**phase, "time/phase": 2.5}]]}, options)
    assert "1.600" in capsys.readouterr().out  # 16 samples in 2.5 s beside 8 in 2 s


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is measured at another size")
def test_the_gpu_benchmark_runs_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    gpu = script("gpu")
    gpu.main([*SMALL, "--batch-size", "2", "--epochs", "1", "--decode-rows", "2", "--json", str(tmp_path / "report")])
    shown = capsys.readouterr().out
    assert "PPO iteration, samples/s a GPU" in shown
    assert '"peak_memory_gib"' in (tmp_path / "report").read_text("utf-8")


def test_arithmetic_is_counted_without_what_is_looked_up() -> None:
    common = script("_common")
    import transformers

    config = common.SHAPES["tiny"].config(100, 16)
    layer = 4 * 32 * 32 + 2 * 4 * 32 * 32 + (3 + 1 + 4 + 1) * 32 + 4 * 32  # projections, MLP, their biases, two norms
    weights = common.weights_of(transformers.AutoModelForCausalLM, config)
    assert weights == 3 * layer + 2 * 32 + 100 * 32
    assert common.forward_flops(10, 2, 4, [3, 5]) == 2 * 10 * 8 + 2 * 2 * 4 * (9 + 25)
