"""SFT, reward model and ILQL under ZeRO-2 and ZeRO-3 on two ranks: what one process trains, to the rounding of sums."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_ppo import VOCAB, HashScorer, make_run, tiny_config
from helpers_process import fresh_accelerate
from helpers_supervised import ARCHITECTURES, causal_lm
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.config.schema import Config
from pipeline.procs import capture
from pipeline.resources import resource_dir
from pipeline.run.directory import Artifact, Outputs
from pipeline.training import ilql, reward_model, sft
from pipeline.training.distributed import state_in_the_way
from pipeline.training.ilql_heads import Heads
from pipeline.training.ilql_output import HEADS
from pipeline.training.metrics import read_rows
from pipeline.training.prompts import derive_seed
from pipeline.training.reward_source import RewardSource
from pipeline.training.sharding import buffers_to

SCRIPT = str(Path(__file__).with_name("ranks_methods.py"))
MODES = ("zero2", "zero3")


def config_of(world: int, layers: int = 1, alpha: float = 0.1, **of_sft: Any) -> Config:
    """A global batch of four, whoever trains it, in several forwards; ILQL trains the top layers."""
    supervised = {"max_length": 96, "batch_size": 4, "max_steps": 4, "lr": 2e-3, "micro_batch_tokens": 128}
    return tiny_config(
        model={"path": "embedded", "num_layers_unfrozen": layers, "embedded": {"max_positions": 128}},
        sft={**supervised, **of_sft},
        reward_model={**supervised, "frozen_fraction": 0.4},
        train={
            "method": "ilql", "seq_length": 72, "batch_size": 4 // world, "total_steps": 4, "eval_interval": 4,
            "eval_prompts": 4, "checkpoint_interval": 2, "micro_batch_tokens": 80, "tracker": "none",
            "num_processes": world,
        },
        ilql={"alpha": alpha, "beta": 0.5, "betas": [4.0], "best_beta": 4.0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Everything is trained once: by this process, and by two ranks in each mode."""
    root = tmp_path_factory.mktemp("root")
    fp16 = config_of(2, mixed_precision="fp16", epochs=2, max_steps=12)
    configs = {"alone": config_of(1), **{mode: config_of(2) for mode in MODES}, "zero2-fp16": fp16}
    configs["zero3-bf16"] = config_of(2, layers=-1, alpha=1e-4)
    for mode, config in configs.items():
        run = make_run(root / mode, config)
        paths = {"data": run.artifact("prefetch", "data"), "model": run.artifact("sft", "model")}
        artifacts = {name: Artifact(str(path.relative_to(run.root)), "0", 0) for name, path in paths.items()}
        run.write_outputs(Outputs("prefetch", "f", 1, artifacts))
    argv = [
        *(sys.executable, "-m", "pipeline.training.launch"),
        *("--config_file", str(resource_dir("accelerate") / "zero3.yaml"), "--num_processes", "2"),
        *("--mixed_precision", "no", SCRIPT, str(root)),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    status, said = capture(argv, env=env, timeout_s=300)
    assert status == 0, said
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RewardSource, "connect", lambda self: HashScorer())
        for name, method in (("sft", sft), ("reward_model", reward_model), ("ilql", ilql)):
            fresh_accelerate()
            assert method.main(["--run", str(root / "alone"), "--out", str(root / "alone" / name)]) == 0
    yield root


def metrics(run: Path, method: str) -> list[dict[str, Any]]:
    result = json.loads((run / method / "result.json").read_text())
    rows = read_rows(run / result["values"]["metrics"])
    timed = ("time/", "tokens_per_second", "padding")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]


def assert_same_rows(run: Path, alone: Path, method: str) -> None:
    ours, theirs = metrics(run, method), metrics(alone, method)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs] and len(ours) > 2
    for mine, his in zip(ours, theirs, strict=True):
        assert mine == {name: pytest.approx(value, rel=1e-3, abs=1e-5) for name, value in his.items()}


def assert_same_weights(run: Path, alone: Path, name: str) -> None:
    ours, theirs = load_file(run / name), load_file(alone / name)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_supervised_training_is_that_of_one_process(root: Path, mode: str) -> None:
    for method in ("sft", "reward_model"):
        assert_same_rows(root / mode, root / "alone", method)
        assert_same_weights(root / mode, root / "alone", f"{method}/model/model.safetensors")


@pytest.mark.parametrize("mode", MODES)
def test_ilql_is_that_of_one_process_with_its_heads_and_targets(root: Path, mode: str) -> None:
    """Rewards of sampled answers are among the metrics."""
    assert_same_rows(root / mode, root / "alone", "ilql")
    for name in ("policy/model.safetensors", f"policy/{HEADS}", f"best/{HEADS}"):
        assert_same_weights(root / mode / "ilql", root / "alone" / "ilql", name)


def test_in_bf16_targets_follow_by_small_steps_and_a_resume_ends_in_the_same_bits(root: Path) -> None:
    """Four steps of 1e-4 of the way each, which in bf16 a first layer's weights would not notice."""
    whole, resumed = (load_file(root / "zero3-bf16" / out / "policy" / HEADS) for out in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    share = whole["target_q_heads.0.2.bias"].norm() / whole["q_heads.0.2.bias"].norm()
    assert 1e-4 < share < 4e-4
    first = Heads(32, VOCAB, True, derive_seed(config_of(2).seed, "ilql heads")).state_dict()["q_heads.0.0.weight"]
    came, went = (whole[f"{name}.0.0.weight"] - first for name in ("target_q_heads", "q_heads"))
    assert 1e-4 < came.norm() / went.norm() < 4e-4


def results(root: Path) -> list[dict[str, Any]]:
    return [json.loads((root / f"results-{rank}.json").read_text()) for rank in range(2)]


def test_rank_0_alone_reads_a_model_that_is_spread(root: Path) -> None:
    """What another rank holds meanwhile is a number a weight; afterwards each has half, and together the whole."""
    folder = root / "zero3/stages/sft/out/model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    bytes_of = sum(weight.numel() * 4 for weight in model.parameters())
    first, second = (found["spread"] for found in results(root))
    assert first["held"] == bytes_of and second["held"] == 4 * len(list(model.parameters()))
    assert first["shares"] == second["shares"] == sum(-(-weight.numel() // 2) for weight in model.parameters())
    for rank in range(2):
        spread = torch.load(folder.with_name(f"weights-{rank}.pt"))
        assert spread.keys() == dict(model.named_parameters()).keys()
        assert all(torch.equal(spread[name], weight) for name, weight in model.named_parameters())


def test_targets_follow_the_masters_exactly_under_zero3(root: Path) -> None:
    assert [found["followed"] for found in results(root)] == [True, True]


@pytest.mark.parametrize("mode", ["zero2-bf16", "zero3-bf16"])
def test_masters_start_exact_and_gradients_are_added_in_float32(root: Path, mode: str) -> None:
    """bf16 takes 1 + 2^-12 for 1, and 256 + 1 for 256. The ranks' gradients are alike, and so is their mean."""
    for found in results(root):
        assert found[mode] == [1.0 + 2**-12, pytest.approx(1.0 + 2**-12 - 260.0, abs=1e-4)]


def test_fp16_leaves_out_steps_until_it_has_found_its_scale(root: Path) -> None:
    """The first scale is 2^24, and each overflow halves it; later on the model learns."""
    rows = [row for row in metrics(root / "zero2-fp16", "sft") if "update/skipped" in row]
    assert rows[0]["update/skipped"] == 1.0 and rows[0]["grad_norm"] == 0.0
    assert rows[-1]["step"] == 12 and rows[-1]["update/skipped"] == 0.0
    assert rows[-1]["losses/loss"] < rows[0]["losses/loss"] - 0.05 and rows[-1]["grad_norm"] > 0.1


@pytest.mark.parametrize("config", ARCHITECTURES[:2], ids=lambda config: config.model_type)
def test_buffers_go_to_the_device_before_the_weights_do(config: Any) -> None:
    """The meta device stands for a GPU."""
    model = causal_lm(config)
    buffers_to(model, torch.device("meta"))
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}


@pytest.mark.parametrize(("free", "leaves"), [(1000, False), (400, True)])
def test_masters_and_moments_leave_a_gpu_that_whole_weights_would_crowd(
    free: int, leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what a GPU has left, `free` bytes, torch holds 100; the whole weight would take 400."""
    master = torch.nn.Parameter(torch.ones(50))
    optimizer = torch.optim.AdamW([master])
    master.sum().backward()
    optimizer.step()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 100, 1200))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 150)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    accelerator: Any = SimpleNamespace(device=torch.device("cuda"), _optimizers=[optimizer])
    moments = (optimizer.state[master]["exp_avg"], optimizer.state[master]["exp_avg_sq"])
    found = state_in_the_way(accelerator, [SimpleNamespace(ds_numel=200, element_size=lambda: 2)])
    assert {id(tensor) for tensor in found} == ({id(tensor) for tensor in (master, *moments)} if leaves else set())
