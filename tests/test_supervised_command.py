"""The SFT and reward-model commands: what they report, and that ranks, reruns and interruptions change nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_supervised import configure, own_process_state, prefetched, read_result, run, same_weights, work
from safetensors.torch import load_file

from pipeline.config.methods import SFT
from pipeline.data.preferences import Preference
from pipeline.data.tokens import encode, load_tokenizer
from pipeline.errors import UserError
from pipeline.procs import capture
from pipeline.resources import resource_dir
from pipeline.run.directory import RunDir
from pipeline.training import fit, reward_model, sft
from pipeline.training.metrics import read_rows
from pipeline.training.models import load_causal_lm

__all__ = ["own_process_state", "prefetched", "run"]  # fixtures of the tests here


def test_sft_learns_and_a_rerun_gives_the_same_bits(run: RunDir) -> None:
    assert work(run, "sft", "one")[0] == 0
    shutil.rmtree(run.checkpoints)
    assert work(run, "sft", "two")[0] == 0

    one, two = run.root / "one", run.root / "two"
    values = read_result(one)
    assert values["steps"] == 16 and values["loss"] < 0.8 * math.log(400)
    assert math.isclose(values["perplexity"], math.exp(values["loss"]))
    assert same_weights(one, two)
    assert json.loads((one / "progress.json").read_text())["step"] == 16
    assert "| step | losses/loss | test/loss | test/perplexity |" in (one / "model" / "README.md").read_text()

    # The reported loss, worked out again from the saved folder, one dialogue at a time.
    model = load_causal_lm(one / "model", torch.float64)
    tokenizer = load_tokenizer(one / "model")
    total, tokens = 0.0, 0
    for line in (run.root / "prefetch" / "data" / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        response = [*encode(tokenizer, row["chosen"]), tokenizer.eos_token_id]
        prompt = encode(tokenizer, row["prompt"])[-(100 - len(response)) :]  # sft.max_length is 100
        ids = torch.tensor([*prompt, *response])
        log_probs = model(ids[None]).logits[0].log_softmax(-1)
        total += F.nll_loss(log_probs[len(prompt) - 1 : -1], ids[len(prompt) :], reduction="sum").item()
        tokens += len(ids) - len(prompt)
    assert tokens == values["test_tokens"] and math.isclose(total / tokens, values["loss"], rel_tol=1e-5)


def test_one_process_and_two_give_the_same_reward_model(run: RunDir) -> None:
    configure(run.root, reward_model={"micro_batch_tokens": 400, "center": 0.01, "max_steps": 9})
    assert work(run, "reward_model", "one")[0] == 0
    shutil.rmtree(run.checkpoints)
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(resource_dir("accelerate") / "ddp-cpu.yaml")]
    command = ["-m", "pipeline.training.reward_model", "--run", str(run.root), "--out", str(run.root / "two")]
    status, output = capture([sys.executable, *launch, "--num_processes", "2", *command], timeout_s=300)
    assert status == 0, output

    one, two = read_result(run.root / "one"), read_result(run.root / "two")
    assert one["tokens"] == two["tokens"]
    assert one["steps"] == two["steps"] == 9 and one["pairs"] == two["pairs"] == 31
    assert two["processes"] == 2
    for key in ("loss", "margin", "chosen_mean", "rejected_mean", "train_loss_last"):
        assert math.isclose(one[key], two[key], abs_tol=1e-4), key
    first, second = (load_file(run.root / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert max(float((first[key] - second[key]).abs().max()) for key in first) < 1e-4


SETTINGS = {"checkpoint_interval": 2, "eval_interval": 4, "max_steps": 11, "micro_batch_tokens": 600}


def curves(run: RunDir) -> list[dict[str, Any]]:
    """The training's rows but for what a clock says."""
    (metrics,) = run.checkpoints.glob("*/metrics.jsonl")
    rows = read_rows(metrics)
    return [{k: v for k, v in row.items() if "time/" not in k and "per_second" not in k} for row in rows]


@pytest.mark.parametrize("method", ["sft", "reward_model"])
def test_killed_in_an_epoch_then_told_to_stop_it_ends_in_the_same_bits(
    method: str, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(run.root, **{method: {**SETTINGS, **({"packing": True} if method == "sft" else {})}})
    assert work(run, method, "whole")[0] == 0
    expected = curves(run)
    assert {row["step"] for row in expected} == {0, 1, 4, 8, 10, 11}
    shutil.rmtree(run.checkpoints)

    real, step = fit.backward, 0

    def disturbed(*arguments: Any) -> Any:
        nonlocal step
        step += 1
        if step == 4:
            raise KeyboardInterrupt  # step 4 is under way, step 2 is saved
        if step == 5 + 5:
            os.kill(os.getpid(), signal.SIGTERM)  # in step 3 + 5
        return real(*arguments)

    monkeypatch.setattr(fit, "backward", disturbed)
    with pytest.raises(KeyboardInterrupt):
        work(run, method, "killed")
    status, stopped = work(run, method, "stopped")
    assert status == 75 and json.loads((stopped / "stopped.json").read_text()) == {"step": 8}
    assert not (stopped / "result.json").exists()
    status, finished = work(run, method, "finished")

    assert status == 0 and same_weights(finished, run.root / "whole")
    assert curves(run) == expected
    ours, whole = read_result(finished), read_result(run.root / "whole")
    clocks = {"seconds", "train_seconds", "tokens_per_second"}
    assert {k: v for k, v in ours.items() if k not in clocks} == {k: v for k, v in whole.items() if k not in clocks}


def test_the_best_test_loss_is_noted_with_its_step(run: RunDir) -> None:
    configure(run.root, sft={"eval_interval": 2, "max_steps": 8, "lr": 0.3})  # too high: it gets worse again
    _, out = work(run, "sft", "out")
    losses = {row["step"]: row["test/loss"] for row in curves(run) if "test/loss" in row}
    values = read_result(out)
    assert list(losses) == [0, 2, 4, 6, 8]
    assert values["best_loss"] == min(losses.values()) == losses[values["best_step"]] and values["loss"] == losses[8]


def test_frozen_weights_come_out_as_they_went_in(run: RunDir) -> None:
    configure(run.root, sft={"frozen_fraction": 0.5, "max_steps": 2})
    _, out = work(run, "sft", "out")
    before = load_file(run.artifact("prefetch", "model") / "model.safetensors")
    after = load_file(out / "model" / "model.safetensors")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if ".layers.1." in key or "final_layer_norm" in key or "embed_out" in key}


def test_a_response_as_long_as_the_limit_still_trains(run: RunDir) -> None:
    tokenizer = load_tokenizer(run.root / "prefetch" / "model")
    preference = Preference("\n\nHuman: Hi\n\nAssistant:", " " + "word " * 50 + "end", " no")
    (dialogue,) = sft.make_dialogues([preference], tokenizer, SFT(max_length=12))
    assert (dialogue.length, dialogue.first) == (12, 1)  # nothing precedes the first token: it carries no loss
    assert list(dialogue.ids) == encode(tokenizer, preference.chosen)[:12]  # and no EOS: it is cut


def test_a_pair_with_an_answer_that_does_not_fit_is_dropped(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(run.root / "prefetch" / "model")
    prompt = "\n\nHuman: Hi\n\nAssistant:"
    fits, long = Preference(prompt, " yes indeed", " no"), Preference(prompt, " yes", " no" * 50)
    whole, chosen, rejected = (encode(tokenizer, text) for text in (prompt, fits.chosen, fits.rejected))
    end = tokenizer.eos_token_id
    length = len(chosen) + 1 + 2  # two tokens of the prompt

    pairs = reward_model.make_pairs([fits, long], tokenizer, length)

    assert pairs == [reward_model.Pair(tuple(whole[-2:]), (*chosen, end), (*rejected, end))]
    assert f"1 of 2 pairs dropped: longer than {length} tokens" in caplog.text
    with pytest.raises(
        UserError, match=r"^reward_model.max_length: no pair of the data fits into \d+ tokens; raise it$"
    ):
        reward_model.make_pairs([fits, long], tokenizer, length - 2)  # the answer alone, without a prompt


@pytest.mark.parametrize("length", [12, 40])
def test_without_eos_the_answer_ends_as_its_text_does(run: RunDir, length: int) -> None:
    tokenizer = load_tokenizer(run.root / "prefetch" / "model")
    preference = Preference("\n\nHuman: Hi\n\nAssistant:", " yes " * 5, " no")
    ended, bare = (
        sft.make_dialogues([preference], tokenizer, SFT(max_length=length, append_eos=eos))[0] for eos in (True, False)
    )
    answer = encode(tokenizer, preference.chosen)
    assert tokenizer.eos_token_id not in bare.ids
    assert (ended.ids[-1] == tokenizer.eos_token_id) == (length == 40)  # a response that is cut does not end there
    assert bare.length <= length and list(bare.ids[-len(answer) :]) == answer[:length]
