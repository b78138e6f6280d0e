"""Tiny models, examples and a run directory for the tests of SFT and reward-model training."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)

from pipeline.config.load import dump, resolve
from pipeline.data import prefetch
from pipeline.run.directory import Artifact, Outputs, RunDir
from pipeline.training import reward_model, sft
from pipeline.training.models import disable_dropout
from pipeline.training.reward_model import Pair
from pipeline.training.sft import Dialogue

MAINS: dict[str, Callable[[list[str]], int]] = {"sft": sft.main, "reward_model": reward_model.main}
"""The commands."""

TINY: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "num_labels": 1}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
DEEP: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
ARCHITECTURES: list[PretrainedConfig] = [
    GPTNeoXConfig(**TINY, **DEEP, max_position_embeddings=64),
    GPTJConfig(**TINY, **GPT, rotary_dim=4),
    GPT2Config(**TINY, **GPT),
    LlamaConfig(**TINY, **DEEP),
    Qwen2Config(**TINY, **DEEP, num_key_value_heads=2),
]
DIALOGUES = [Dialogue((3, 4, 5, 6, 7, 0), 3), Dialogue((8, 9, 0), 2), Dialogue((10, 11, 12, 13, 0), 1)]
PAIRS = [Pair((3, 4, 5, 6), (7, 8, 0), (9, 0)), Pair((1, 2), (3, 0), (4, 5, 6, 7, 0)), Pair((9,), (5, 0), (0,))]

each_architecture = pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: config.model_type)


def causal_lm(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    disable_dropout(model)
    return model


def classifier(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    disable_dropout(model)
    return model


@pytest.fixture(autouse=True)
def own_process_state() -> Iterator[None]:
    """The stages set up their process: repeatable kernels, accelerate's singletons, signals. Others start afresh."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    AcceleratorState._reset_state(reset_partial_state=True)


class Rank:
    """As much of an Accelerator as one rank's backward pass needs."""

    device = torch.device("cpu")
    distributed_type = "MULTI_CPU"

    def __init__(self, index: int, world: int) -> None:
        self.process_index, self.num_processes = index, world

    @contextlib.contextmanager
    def no_sync(self, _: Any) -> Iterator[None]:
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()


TREE: dict[str, Any] = {
    "model": {
        "path": "embedded",
        "num_layers_unfrozen": 1,
        "embedded": {"vocab_size": 400, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 128},
    },
    "data": {"source": "demo", "demo": {"train": 120, "test": 31}},
    "sandbox": {"engine": "none"},
    "train": {"seq_length": 100, "tracker": "none"},
    "generate": {"max_new_tokens": 48},
    "sft": {"max_length": 100, "batch_size": 16, "lr": 3e-2, "epochs": 2},
    "reward_model": {"max_length": 100, "batch_size": 7, "lr": 5e-3, "base": "model"},
    "serving": {"max_length": 128},
}


def configure(root: Path, **sections: dict[str, Any]) -> None:
    """Write the run's configuration, with some sections' settings changed."""
    tree = {**TREE, **{name: {**TREE.get(name, {}), **changes} for name, changes in sections.items()}}
    (root / "config.yaml").write_text(dump(resolve(tree)))


def make_run(root: Path) -> RunDir:
    """A run whose prefetch is done: 120 demo dialogues and a model of 13,000 weights."""
    configure(root)
    prefetch.main(["--run", str(root), "--out", str(root / "prefetch")])
    artifacts = {name: Artifact(f"prefetch/{name}", "0", 0) for name in ("data", "model")}
    made = RunDir(root)
    made.write_outputs(Outputs("prefetch", "f", 1, artifacts))
    return made


def read_result(out: Path) -> dict[str, Any]:
    """The values that a stage's work recorded."""
    result = json.loads((out / "result.json").read_text())
    assert result["artifacts"] == {"model": "model"}
    return dict(result["values"])


def same_weights(one: Path, two: Path) -> bool:
    """Whether two results hold the same model to the last bit."""
    first, second = (load_file(out / "model" / "model.safetensors") for out in (one, two))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def prefetched(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that has its data and its base model."""
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def run(prefetched: RunDir, tmp_path: Path) -> RunDir:
    """A copy of it, for one test."""
    shutil.copytree(prefetched.root, tmp_path / "run")
    return RunDir(tmp_path / "run")


def work(run: RunDir, method: str, out: str) -> tuple[int, Path]:
    """Run a command: its exit status, and where its result is."""
    folder = run.root / out
    return MAINS[method](["--run", str(run.root), "--out", str(folder)]), folder
