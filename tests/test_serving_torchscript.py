"""The flavour torchscript: one graph for every batch, length and device, that needs nothing of this project."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_serving import SMALL, VOCAB, save_reward_model, serving_config, tiny_model
from transformers import AutoModelForSequenceClassification

from pipeline import procs
from pipeline.config.load import check
from pipeline.config.serving import Serving
from pipeline.errors import UserError
from pipeline.serving import by_hand, convert, model_store, texts, torchscript
from pipeline.serving.scorer import cut
from pipeline.serving.scoring import RewardModel
from pipeline.serving.torchscript import Graph, check_image, image_torch

TODAY = Graph(torch.__version__, 10, ("aten::add", "aten::matmul"))
IMAGE = "docker://nvcr.io/nvidia/tritonserver:22.08-pyt-python-py3"


def torchscript_serving(**settings: Any) -> Serving:
    return serving_config(**settings).serving.model_copy(update={"flavour": "torchscript"})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("torchscript")
    convert.convert(save_reward_model(root / "rm", "llama"), root / "store", torchscript_serving(), image=IMAGE)
    return root / "store"


@pytest.fixture(autouse=True)
def plain_execution() -> Iterator[None]:
    """As the served graph is run: the optimising executor compiles anew for each shape."""
    with torch.jit.optimized_execution(False):
        yield


def graph_of(store: Path) -> Any:
    return torch.jit.load(str(store / "reward-model/1/model.pt"))


def tensors(rows: list[list[int]], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    padded = [[*row, *([VOCAB - 1] * (width - len(row)))] for row in rows]
    return torch.tensor(padded, dtype=torch.int32), torch.tensor([[len(row)] for row in rows], dtype=torch.int32)


@pytest.mark.parametrize("kind", SMALL)
def test_a_graph_takes_any_shape_and_only_operators_of_the_oldest_image(kind: str, tmp_path: Path) -> None:
    tiny_model(kind).save_pretrained(tmp_path)
    with torch.jit.optimized_execution(True):
        info = torchscript.save(torchscript.trace(eager(tmp_path)), tmp_path / "model.pt")
    check_image(IMAGE, info)
    graph, scorer, rng = torch.jit.load(str(tmp_path / "model.pt")), RewardModel(tmp_path), random.Random(1)
    assert not devices(graph)
    for count, width in ((1, 1), (1, 128), (5, 1), (2, 3), (7, 11), (3, 77)):
        rows = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, width))] for _ in range(count)]
        rewards = graph(*tensors(rows, width))
        assert (rewards.shape, rewards.dtype) == ((count, 1), torch.float32)
        assert rewards.squeeze(1).tolist() == pytest.approx(scorer.score(rows), abs=1e-5)


def test_a_store_records_what_its_graph_needs_and_keeps_the_model_for_scoring_in_process(store: Path) -> None:
    manifest = model_store.read_manifest(store)
    assert manifest.flavour == "torchscript"
    assert manifest.graph is not None
    assert manifest.graph["torch"] == torch.__version__
    assert "aten::matmul" in manifest.graph["operators"]
    assert manifest.parity["max_difference"] <= 1e-5
    scorer = RewardModel(store / "reward-model/1/reward_model")
    for answer in manifest.known_answers:
        assert scorer.score([answer.tokens])[0] == pytest.approx(answer.reward, abs=1e-5)
    assert not (store / "reward-model/1/model.py").exists()


def test_a_store_is_another_than_the_same_models_python_store(store: Path, tmp_path: Path) -> None:
    python = convert.convert(save_reward_model(tmp_path / "rm", "llama"), tmp_path / "store", serving_config().serving)
    assert python.weights_sha256 == model_store.read_manifest(store).weights_sha256
    assert python.identity != model_store.read_manifest(store).identity


def test_the_configuration_is_the_pytorch_backends_with_a_warm_up_of_each_length(store: Path) -> None:
    config = model_store.parse_config((store / "reward-model/config.pbtxt").read_text())
    assert (config.backend, config.platform, config.default_model_filename) == (
        "pytorch",
        "pytorch_libtorch",
        "model.pt",
    )
    assert not config.HasField("dynamic_batching")
    assert not any(part.allow_ragged_batch for part in config.input)
    shapes = [(one.batch_size, one.inputs["input_ids"].dims[0]) for one in config.model_warmup]
    # 1024 tokens and 16 rows at the most, for lengths up to 128
    assert shapes == [(8, 128), (16, 64), (16, 32), (16, 16), (16, 8), (16, 4), (16, 2), (16, 1)]
    # That backend feeds inputs by the names of forward's arguments.
    arguments = [argument.name for argument in graph_of(store).forward.schema.arguments]
    assert arguments == ["self", *(part.name for part in config.input)]
    assert config.parameters["torch"].string_value == torch.__version__
    assert config.parameters["INFERENCE_MODE"].string_value == "true"


def test_a_process_that_has_torch_and_nothing_else_gives_the_known_answers(store: Path) -> None:
    answers = model_store.read_manifest(store).known_answers
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["pipeline", "transformers"]))  # cannot be imported from now on
import torch
graph = torch.jit.load({str(store / "reward-model/1/model.pt")!r})
for tokens, reward in {[(answer.tokens, answer.reward) for answer in answers]!r}:
    got = graph(torch.tensor([tokens], dtype=torch.int32), torch.tensor([[len(tokens)]], dtype=torch.int32)).item()
    assert abs(got - reward) < 1e-5, (got, reward)
print("agreed")
"""
    status, text = procs.capture([sys.executable, "-I", "-c", code], timeout_s=120)
    assert (status, text.strip()) == (0, "agreed")


def test_a_graph_has_no_device_of_its_own(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    example = tensors([[1, 2, 3], [4, 5]], 3)
    with warnings.catch_warnings(), torch.jit.optimized_execution(True):
        warnings.simplefilter("ignore")
        naive = torch.jit.trace(torchscript.ScoringGraph(eager(tmp_path)), example, check_trace=False)
        assert devices(naive)  # the tracer writes down where the example was
        assert not devices(torchscript.trace(eager(tmp_path)))


def eager(folder: Path) -> Any:
    options = {"attn_implementation": "eager", "local_files_only": True}
    return AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()


def devices(graph: Any) -> list[str]:
    """The devices that a graph names."""
    whole = graph.inlined_graph
    return [str(node) for node in whole.findAllNodes("prim::Constant") if str(node.output().type()) == "Device"]


def test_a_row_without_a_reward_gets_no_number_and_leaves_the_others_alone(store: Path) -> None:
    graph = graph_of(store)
    ids = torch.tensor([[1, 2, 3], [1, 2, VOCAB], [1, -1, 3], [1, 2, 3], [1, 2, 3]], dtype=torch.int32)
    rewards = graph(ids, torch.tensor([[3], [3], [2], [0], [4]], dtype=torch.int32)).squeeze(1)
    assert rewards.isnan().tolist() == [False, True, True, True, True]
    alone = graph(ids[:1], torch.tensor([[3]], dtype=torch.int32)).item()
    assert rewards[0].item() == pytest.approx(alone, abs=1e-6)
    padding = graph(ids[1:2], torch.tensor([[2]], dtype=torch.int32)).item()  # the unknown id is only padding
    assert padding == pytest.approx(graph(ids[:1], torch.tensor([[2]], dtype=torch.int32)).item(), abs=1e-6)


def test_a_graph_that_bakes_its_example_in_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Baked(torchscript.ScoringGraph):
        def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids[:, : int(lengths.max())], lengths.clamp(max=int(lengths.max())))

    monkeypatch.setattr(torchscript, "ScoringGraph", Baked)
    with pytest.raises(UserError, match=r"parity_tolerance: the model store's rewards differ .* tokens, batch of"):
        convert.convert(save_reward_model(tmp_path / "rm"), tmp_path / "store", torchscript_serving())
    assert not (tmp_path / "store/manifest.json").exists()


@pytest.mark.parametrize(
    ("image", "version"),
    [
        (IMAGE, (1, 13)),
        ("docker://nvcr.io/nvidia/tritonserver:22.11-py3", (1, 13)),
        ("docker://nvcr.io/nvidia/tritonserver:25.02-py3@sha256:00", (2, 6)),
        ("docker://nvcr.io/nvidia/tritonserver:26.11", (2, 13)),
        ("docker://nvcr.io/nvidia/tritonserver:21.01-py3", None),
        ("images/mine.sif", None),
    ],
)
def test_an_images_torch_is_known_by_its_tag(image: str, version: tuple[int, int] | None) -> None:
    assert image_torch(image) == version


def test_an_image_too_old_for_a_graph_is_refused_in_one_line() -> None:
    check_image(IMAGE, TODAY)  # newer, but nothing in it is
    check_image("images/mine.sif", replace(TODAY, format=11))  # nothing is known about it
    check_image(IMAGE, replace(TODAY, torch="1.12.1", operators=("aten::anything",)))
    with pytest.raises(UserError, match=r"22\.08.* has torch 1\.13, but .* needs aten::scaled_dot.*, file format 11;"):
        check_image(IMAGE, replace(TODAY, format=11, operators=("aten::add", "aten::scaled_dot_product_attention")))


@pytest.mark.parametrize("engine", ["venv", "none"])
def test_an_engine_without_the_pytorch_backend_is_refused_early(engine: str) -> None:
    with pytest.raises(UserError, match=r"serving\.flavour: torchscript is served by a container image"):
        check({"serving": {"flavour": "torchscript"}, "sandbox": {"engine": engine}})
    assert check({"serving": {"flavour": "torchscript"}, "sandbox": {"engine": "apptainer"}})


def test_a_store_brings_its_settings_to_those_who_serve_it_or_score_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"max_length": 32, "max_batch_size": 3, "max_batch_tokens": 64}
    store = tmp_path / "store"
    convert.convert(save_reward_model(tmp_path / "rm"), store, torchscript_serving(**limits))
    own = {"flavour": "torchscript", "dtype": "float32", **limits}
    with pytest.raises(UserError, match=r"serving\.flavour: torchscript is served by a container image"):
        by_hand.configuration(None, store, "venv", [])
    served = by_hand.configuration(None, store, "apptainer", ["serving.num_threads=2"]).serving
    assert served.model_dump(include=set(own)) == own

    with texts.open_texts(None, store, {}) as (_, config):
        assert config.serving.model_dump(include=set(own)) == own
    clients: list[Serving] = []

    def client(_locate: Any, serving: Serving, *_: Any) -> Any:
        clients.append(serving)
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(texts, "TritonScorer", client)
    with texts.open_texts(None, store, {"TRITON_HOST": "127.0.0.1:1/rm"}):
        (asked,) = clients
    assert cut([20, 1, 1, 1, 1], asked) == [[0], [1, 2, 3], [4]]


def test_flash_attention_in_float32_is_refused_early() -> None:
    with pytest.raises(UserError, match=r"serving\.attention: flash_attention_2 computes in 16 bits only"):
        check({"serving": {"attention": "flash_attention_2", "dtype": "float32"}})
