"""ILQL from the command: a run's stage, a resume, ranks, the best checkpoint of a sweep, and whether it learns."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers_ppo import HashScorer, finish_stage, json_line, make_run, tiny_config, tiny_model, tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline import procs
from pipeline.config.schema import Config
from pipeline.config.training import Generate
from pipeline.data import demo_text as text
from pipeline.data.preferences import Preference
from pipeline.errors import UserError
from pipeline.evaluation import evaluate
from pipeline.resources import resource_dir
from pipeline.run.directory import RunDir
from pipeline.training import ilql
from pipeline.training.ilql_output import HEADS, SETTINGS, load_ilql
from pipeline.training.reward_source import RewardSource
from pipeline.training.stopping import decode_text

TRAIN: dict[str, Any] = {
    "method": "ilql", "seq_length": 72, "batch_size": 4, "total_steps": 8, "eval_interval": 4, "eval_prompts": 4,
    "checkpoint_interval": 3, "tracker": "none", "num_processes": 1,
}  # fmt: skip
ILQL: dict[str, Any] = {"alpha": 0.1, "cql_scale": 0.1, "beta": 0.5, "betas": [0.0, 1.0, 4.0], "best_beta": 1.0}


KIND, RUDE = ("Good.", "Happy."), ("Not.", "Again.")
"""Answers of a few tokens: what is paid at their end is soon known at their beginning."""


def config_of(layers: int = 1, train: dict[str, Any] | None = None, **sections: Any) -> Config:
    model = {"path": "embedded", "num_layers_unfrozen": layers, "embedded": {"max_positions": 128}}
    return tiny_config(model=model, train={**TRAIN, **(train or {})}, **{"ilql": ILQL, **sections})


def train(run: RunDir, name: str = "out") -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        return ilql.main(["--run", str(run.root), "--out", str(run.root / name)])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.use_deterministic_algorithms(deterministic)


def rows_of(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {**load_file(folder / "model.safetensors"), **load_file(folder / HEADS)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDir]:
    run = make_run(tmp_path_factory.mktemp("trained"), config_of())
    assert train(run) == 0
    yield run


def test_a_training_leaves_a_policy_its_heads_and_its_metrics(trained: RunDir) -> None:
    result = json.loads((trained.root / "out/result.json").read_text())
    assert set(result["artifacts"]) == {"policy", "best"}
    values = result["values"]
    rows = [row for row in rows_of(trained) if "reward/mean@beta=4" in row]
    assert [row["step"] for row in rows] == [0, 4, 8]
    assert {"reward/mean@beta=0", "reward/mean@beta=1", "heldout/losses/loss_q", "heldout/qvalues/1/std"} <= set(
        rows[0]
    )
    assert values["reward_mean_last"] == rows[-1]["reward/mean@beta=1"]
    steps = [row for row in rows_of(trained) if "losses/loss" in row]
    assert {"losses/loss_q", "losses/loss_v", "losses/loss_cql", "losses/loss_awac", "values/mean"} <= set(steps[0])
    assert steps[-1]["losses/loss"] < steps[0]["losses/loss"]


def test_before_training_every_beta_decodes_the_language_model(trained: RunDir) -> None:
    first = rows_of(trained)[0]
    assert first["step"] == 0
    assert first["reward/mean@beta=0"] == first["reward/mean@beta=1"] == first["reward/mean@beta=4"]


def test_the_best_of_a_sweep_is_kept_by_the_beta_that_was_chosen(trained: RunDir) -> None:
    """trlX looks for `reward/mean`, which a sweep does not have, and never keeps a best checkpoint."""
    rows = {row["step"]: row["reward/mean@beta=1"] for row in rows_of(trained) if "reward/mean@beta=1" in row}
    values = json.loads((trained.root / "out/result.json").read_text())["values"]
    assert values["reward_mean_best"] == max(rows.values()) == rows[values["best_step"]]
    assert values["best_step"] == min(step for step, reward in rows.items() if reward == max(rows.values()))
    best, last = weights_of(trained.root / "out/best"), weights_of(trained.root / "out/policy")
    start = load_file(trained.artifact("sft", "model") / "model.safetensors")
    moved = any(not torch.equal(start[name], best[name]) for name in start)
    assert moved == (values["best_step"] > 0)
    assert all(torch.equal(best[name], last[name]) for name in best) == (values["best_step"] == 8)


def test_the_policy_loads_alone_and_with_its_heads(trained: RunDir) -> None:
    folder = trained.root / "out/policy"
    alone = AutoModelForCausalLM.from_pretrained(folder)
    policy = load_ilql(folder, device="cpu")
    assert policy.beta == 1.0 == json.loads((folder / SETTINGS).read_text())["beta"]
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), policy.split.whole.parameters(), strict=True))
    generate = Generate(max_new_tokens=6)
    prompt = "\n\nHuman: Hello\n\nAssistant:"
    assert policy.answer([prompt], generate) == policy.answer([prompt], generate)
    assert policy.answer([prompt], generate, beta=1e6) != policy.answer([prompt], generate, beta=0.0)
    names = load_file(folder / HEADS).keys()
    assert {"q_heads.1.2.weight", "target_q_heads.0.0.bias", "v_head.2.weight"} <= names


def test_a_folder_without_whole_heads_is_refused_in_one_line(trained: RunDir, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"holds no whole ILQL heads .*; give a folder that ILQL wrote"):
        load_ilql(tmp_path, device="cpu")


def test_the_targets_follow_at_every_step(trained: RunDir) -> None:
    """With alpha 0.1 a target moves a tenth of the way at each of 8 steps; trlX's moved once a pass over the data."""
    weights = weights_of(trained.root / "out/policy")
    trained_bias, target_bias = weights["q_heads.0.2.bias"], weights["target_q_heads.0.2.bias"]
    share = (target_bias.norm() / trained_bias.norm()).item()  # both started at 0
    assert 0.1 < share < 1 - 0.9**8 + 0.05


def test_evaluation_decodes_the_policy_with_its_heads(trained: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    finish_stage(trained, "train", "policy", trained.root / "out/policy")
    seen: list[float] = []
    original = evaluate.steer

    def noted(targets: Any, beta: float, dtype: torch.dtype) -> Any:
        seen.append(beta)
        return original(targets, 50 * beta, dtype)

    monkeypatch.setattr(evaluate, "steer", noted)
    evaluate.main(["--run", str(trained.root), "--out", str(trained.root / "evaluated")])
    steered = json.loads((trained.root / "evaluated/report/report.json").read_text())
    monkeypatch.setattr(evaluate, "has_heads", lambda folder: False)
    evaluate.main(["--run", str(trained.root), "--out", str(trained.root / "evaluated-alone")])
    alone = json.loads((trained.root / "evaluated-alone/report/report.json").read_text())
    assert seen == [1.0]
    assert steered["kl"] > alone["kl"] >= 0
    assert [row["policy"] for row in steered["samples"]] != [row["policy"] for row in alone["samples"]]


def test_stopped_in_the_middle_of_an_epoch_and_resumed_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (make_run(tmp_path / name, config_of(layers=-1)) for name in ("whole", "cut"))
    assert train(whole) == 0
    asked: list[bool] = []

    class StopsAtTheFifth(ilql.StopRequest):
        def __bool__(self) -> bool:
            asked.append(True)
            return len(asked) == 5

    with monkeypatch.context() as patched:
        patched.setattr(ilql, "StopRequest", StopsAtTheFifth)
        assert train(cut, "stopped") == 75
    assert json.loads((cut.root / "stopped/stopped.json").read_text()) == {"step": 5}
    assert train(cut) == 0
    for name in ("policy", "best"):
        ours, theirs = weights_of(cut.root / "out" / name), weights_of(whole.root / "out" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    rewards = [[row.get("reward/mean@beta=4") for row in rows_of(run)] for run in (cut, whole)]
    assert rewards[0] == rewards[1]


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", config_of(train={"total_steps": 4}))
    assert train(one) == 0
    two = make_run(tmp_path / "two", config_of(train={"total_steps": 4, "batch_size": 2, "num_processes": 2}))
    out = two.root / "out"
    out.mkdir()
    argv = [
        *(sys.executable, "-m", "pipeline.training.launch"),
        *("--config_file", str(resource_dir("accelerate") / "ddp-cpu.yaml"), "--num_processes", "2"),
        *("-m", "pipeline.training.ilql", "--run", str(two.root), "--out", str(out)),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (out / "log").open("wb") as log:
        process = procs.spawn(argv, env=env, output=log)
    assert process.wait(120) == 0, (out / "log").read_text()
    ours, theirs = weights_of(out / "policy"), weights_of(one.root / "out/policy")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-5)
    for key in ("losses/loss", "reward/mean@beta=4", "heldout/losses/loss_v"):
        [mine, his] = [[row[key] for row in rows_of(run) if key in row] for run in (two, one)]
        assert mine == pytest.approx(his, rel=1e-3)


def polite_and_rude(count: int, seed: int) -> list[Preference]:
    """The demo's requests, each answered kindly and rudely."""
    random = Random(seed)
    requests = [
        f"\n\nHuman: {random.choice(text.REQUESTS).format(random.choice(text.TASKS).what)}" for _ in range(count)
    ]
    return [
        Preference(f"{request}\n\nAssistant:", f" {random.choice(KIND)}", f" {random.choice(RUDE)}")
        for request in requests
    ]


def manners(ids: list[int]) -> float:
    """1 for an answer that begins as a kind one, -1 for one that begins as a rude one."""
    answer = decode_text(tokenizer(), ids[:-1]).rsplit("Assistant: ", 1)[-1]
    return float(answer.startswith(KIND)) - float(answer.startswith(RUDE))


def test_ilql_earns_more_on_held_out_prompts_than_the_language_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chosen and rejected answers are imitated alike, so that all that is gained over beta 0 comes from Q."""
    monkeypatch.setattr(RewardSource, "connect", lambda self: HashScorer(manners))
    config = config_of(
        layers=-1,
        train={"total_steps": 60, "batch_size": 16, "eval_interval": 60, "eval_prompts": 48},
        ilql={**ILQL, "beta": 0.0, "alpha": 0.5, "betas": [0.0, 2.0, 8.0], "best_beta": 8.0},
        ppo={"delta_reward": False},
        optimizer={"lr": 5e-3},
        evaluate={"num_prompts": 4, "batch_size": 48},
    )
    run = make_run(tmp_path, config)
    for split, rows in (("train", polite_and_rude(200, seed=1)), ("test", polite_and_rude(48, seed=2))):
        path = run.artifact("prefetch", "data") / f"{split}.jsonl"
        path.write_text("".join(json_line(row) for row in rows))
    assert train(run) == 0
    last = rows_of(run)[-1]
    by_language_model, somewhat, most = (last[f"reward/mean@beta={beta}"] for beta in (0, 2, 8))
    assert by_language_model < somewhat < most
    assert most > by_language_model + 0.4
