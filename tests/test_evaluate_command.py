"""The evaluate command on a run with random models."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers_ppo import finish_stage, make_run, tiny_config, tiny_model, tokenizer

from pipeline.config.load import dump
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import all_logprobs, main, mean_kl
from pipeline.result import render_summary
from pipeline.run.directory import Artifact, Outputs
from pipeline.stages.registry import REGISTRY
from pipeline.training.decode import decode
from pipeline.training.split import split_model
from pipeline.training.stopping import StopSequences

CONFIG = tiny_config()


def evaluate(root: Path, moved: bool) -> dict:
    run = make_run(root, CONFIG)
    policy = root / "stages/train/out/policy"
    if moved:
        tiny_model(spread=2.2, seed=5).save_pretrained(policy)
        tokenizer().save_pretrained(policy)
    else:
        shutil.copytree(run.artifact("sft", "model"), policy)
    finish_stage(run, "train", "policy", policy)
    main(["--run", str(root), "--out", str(root / "out")])
    return json.loads((root / "out/report/report.json").read_text())


def test_a_policy_that_never_moved_ties_with_its_start(tmp_path: Path) -> None:
    report = evaluate(tmp_path, moved=False)
    assert report["sft"] == report["policy"]
    assert report["win_rate"] == 0.5 and report["kl"] == 0.0
    assert report["paired"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 4}
    assert all(sample["sft"] == sample["policy"] for sample in report["samples"])


def test_the_report_compares_and_shows_both(tmp_path: Path) -> None:
    report = evaluate(tmp_path, moved=True)
    assert report["kl"] > 0.0
    rewards = [report[side]["reward_mean"] for side in ("sft", "policy")]
    assert math.isclose(report["paired"]["mean"], rewards[1] - rewards[0], abs_tol=1e-9)
    assert report["paired"]["low"] < report["paired"]["mean"] < report["paired"]["high"]
    assert len(report["samples"]) == 2 and set(report["samples"][0]) == {
        "prompt", "sft", "sft_reward", "policy", "policy_reward", "chosen", "chosen_reward",
    }  # fmt: skip
    assert report["reward_model"]["accuracy"] == 0.9
    assert "<html" in (tmp_path / "out/report/index.html").read_text()
    values = json.loads((tmp_path / "out/result.json").read_text())["values"]
    assert values["paired"] == report["paired"] and values["win_rate"] == report["win_rate"]


def test_a_run_without_training_says_what_to_do(tmp_path: Path) -> None:
    make_run(tmp_path, CONFIG)
    with pytest.raises(UserError, match="stage train is not done; run it first with --stage train"):
        main(["--run", str(tmp_path), "--out", str(tmp_path / "out")])


def test_a_run_without_training_after_sft_compares_the_base_model_with_its_sft(tmp_path: Path) -> None:
    config = tiny_config(all=["prefetch", "sft", "convert", "evaluate"])
    run = make_run(tmp_path, config)
    base, data = tmp_path / "stages/prefetch/out/model", run.artifact("prefetch", "data")
    tiny_model(spread=1.5, seed=3).save_pretrained(base)
    tokenizer().save_pretrained(base)
    artifacts = {
        name: Artifact(str(path.relative_to(tmp_path)), "0", 0) for name, path in (("data", data), ("model", base))
    }
    run.write_outputs(Outputs("prefetch", "f", 1, artifacts))
    assert REGISTRY["evaluate"].needs(config) == ("prefetch", "sft", "convert")

    (tmp_path / "config.yaml").write_text(dump(config))
    main(["--run", str(tmp_path), "--out", str(tmp_path / "out")])

    report = json.loads((tmp_path / "out/report/report.json").read_text())
    assert report["names"] == {"sft": "Base model", "policy": "SFT model"}
    assert report["kl"] > 0.0 and report["sft"] != report["policy"]
    page = (tmp_path / "out/report/index.html").read_text()
    assert "the SFT model" in page or "The SFT model" in page
    assert "KL from the base model" in page and "SFT start" not in page

    finish_stage(run, "evaluate", "report", tmp_path / "out/report")
    outputs = run.outputs("evaluate")
    assert outputs is not None
    summary = render_summary(run, Path("runs/x"), outputs)
    assert "Base model   SFT model" in summary and "sft: runs/x/models/sft" in summary


def test_kl_is_the_mean_over_responses_of_the_summed_difference() -> None:
    policy, start = (split_model(tiny_model(spread=2.0, seed=seed), 1) for seed in (0, 1))
    generator = torch.Generator().manual_seed(0)
    prompts = [[5, 6], [7], [8, 9, 10]]
    responses = decode(policy, prompts, CONFIG.generate, StopSequences(tokenizer(), []), 0, generator)
    slow = 0.0
    for response in responses:
        ids = torch.tensor([response.prompt + response.tokens])
        for t, token in enumerate(response.tokens, start=len(response.prompt)):
            with torch.no_grad():
                ours, theirs = (
                    split.whole(input_ids=ids[:, :t], use_cache=False).logits[0, -1].double().log_softmax(-1)[token]
                    for split in (policy, start)
                )
            slow += float((theirs - ours).exp() - 1 - (theirs - ours))
    ours, theirs = (all_logprobs(split, responses, CONFIG) for split in (policy, start))
    assert mean_kl(ours, theirs, 3) == pytest.approx(slow / 3, rel=1e-3)
