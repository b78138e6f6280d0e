"""The flavour `torchscript`: the reward model as one graph for Triton's PyTorch backend, which has no Python.

The graph is traced from Hugging Face's eager model, so that it holds only plain operators, which libtorch has had for
years. Everything that depends on shapes or devices is derived from the inputs: any batch and length works, on the
device that the graph is loaded to.
"""

from __future__ import annotations

import random
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from pipeline.errors import UserError

GRAPH_FILE = "model.pt"
_OLDEST = """
Int __and__ __or__ add addmm bitwise_not cat chunk contiguous cos cumsum div dropout embedding eq expand flatten
floor_divide gather ge gelu layer_norm le linear lt matmul mean mul neg ones_like permute pow relu repeat
repeat_interleave reshape rsqrt silu sin size slice softmax split squeeze stack sub sum tanh to transpose unsqueeze
view where
"""
OLDEST_OPERATORS = frozenset(f"aten::{name}" for name in _OLDEST.split())
"""Operators that torch 1.13, the one of the image 22.08, takes and computes as today's does: tried with 1.13.1."""
_IMAGE_TORCH = {
    **{"22.08": (1, 13), "22.12": (1, 14), "23.03": (2, 0), "23.06": (2, 1), "23.12": (2, 2), "24.02": (2, 3)},
    **{"24.05": (2, 4), "24.10": (2, 5), "24.11": (2, 6), "25.03": (2, 7), "25.05": (2, 8), "25.09": (2, 9)},
    **{"25.12": (2, 10), "26.02": (2, 11), "26.04": (2, 12), "26.07": (2, 13)},
}
"""From which of NVIDIA's images on the PyTorch backend has which torch."""
OLDEST_FORMAT = 10
"""The newest file format that torch 1.13 reads."""


class ScoringGraph(nn.Module):
    """What is traced: input_ids int32 (b, T), right-padded with anything, and lengths int32 (b, 1) to rewards (b, 1).

    A row that has no reward (a length outside 1..T, a token id outside the vocabulary) gets NaN, which no client takes
    for a reward: a graph cannot refuse one row, and an id out of range would end a GPU's context.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base, self.score = model.base_model, model.score
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)
        self.window = getattr(model.config, "sliding_window", None)
        self.low = torch.finfo(model.dtype).min

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        ids, counts = input_ids.long(), lengths.long()
        places = torch.ones_like(ids).cumsum(1)  # (b, T): 1 to T
        inside = places <= counts  # (b, T)
        known = (ids >= 0) & (ids < self.vocab_size)
        scorable = (
            (counts >= 1) & (counts <= places[:, -1:]) & ((known | ~inside).long().sum(1, True) == places[:, -1:])
        )
        ids = ids * known.long()
        distance = places.unsqueeze(2) - places.unsqueeze(1)  # (b, T, T): how far back a key is
        hidden_from = (distance < 0) if self.window is None else (distance < 0) | (distance >= self.window)
        mask = hidden_from.unsqueeze(1).to(self.score.weight.dtype) * self.low  # (b, 1, T, T), added to the scores
        states = self.base(input_ids=ids, attention_mask=mask, position_ids=places - 1, use_cache=False)[0]  # (b, T, D)
        last = torch.where(scorable, counts, torch.ones_like(counts)) - 1  # (b, 1)
        at_last = states.gather(1, last.unsqueeze(-1).expand(-1, -1, states.shape[-1])).squeeze(1)  # (b, D)
        rewards = self.score(at_last).float()  # (b, 1)
        return torch.where(scorable, rewards, rewards * float("nan"))


@dataclass(frozen=True)
class Graph:
    """What a saved graph needs of the libtorch that loads it."""

    torch: str
    """The version that traced it."""
    format: int
    """Of the file."""
    operators: tuple[str, ...]


def graph_file(folder: Path) -> Path:
    """Where the graph of the model in a store's Hugging Face folder is."""
    return folder.with_name(GRAPH_FILE)


def write_graph(folder: Path, dtype: str, device: str) -> Graph:
    """Trace the model in a store's Hugging Face folder and save the graph beside it."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager", local_files_only=True
    )
    return save(trace(model.to(device).eval().requires_grad_(False)), graph_file(folder))


def trace(model: Any) -> Any:
    """Trace a one-label sequence classifier that was loaded with eager attention.

    UserError when something of the example's device is left in the graph.
    """
    device = model.device
    example = torch.tensor([[1, 2, 3, 4, 5], [3, 2, 1, 0, 0], [5, 6, 0, 0, 0]], dtype=torch.int32, device=device)
    lengths = torch.tensor([[5], [3], [2]], dtype=torch.int32, device=device)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the tracer, about what the parity check holds the graph to
        graph: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
            ScoringGraph(model).eval(), (example, lengths), check_trace=False
        )
    for part in _graphs(graph):
        _free_devices(part)
    return graph


def save(graph: Any, file: Path) -> Graph:
    """Write the graph; returns what it needs of the libtorch that loads it."""
    graph.save(str(file))
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/version"))
        version = int(archive.read(name))
    operators = {node.kind() for part in _graphs(graph) for node in _nodes(part)}
    return Graph(
        str(torch.__version__), version, tuple(sorted(kind for kind in operators if kind.startswith("aten::")))
    )


class GraphModel:
    """A saved graph, loaded as Triton loads it: nothing of the model's Python is needed."""

    def __init__(self, file: Path, device: str, vocab_size: int, max_length: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of all TorchScript, which old images must have
            self.graph = torch.jit.load(str(file), map_location=device).eval()  # type: ignore[no-untyped-call]
        self.device, self.vocab_size, self.max_length = device, vocab_size, max_length

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The rewards of sequences that are computed together, padded with tokens of all kinds beyond the longest."""
        draw = random.Random(len(sequences))
        width = min(self.max_length, max(map(len, sequences)) + draw.randint(0, 3))
        rows = [[*row, *draw.choices(range(self.vocab_size), k=width - len(row))] for row in sequences]
        ids = torch.tensor(rows, dtype=torch.int32, device=self.device)  # (b, T)
        lengths = torch.tensor([[len(row)] for row in sequences], dtype=torch.int32, device=self.device)  # (b, 1)
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # as the server runs it
            rewards: list[float] = self.graph(ids, lengths).squeeze(1).tolist()
        return rewards


def check_image(image: str, graph: Graph) -> None:
    """UserError when the libtorch of NVIDIA's image `image` cannot load `graph`, as far as its tag tells.

    A libtorch loads what the same or an older torch wrote. What a newer one wrote, it loads if the file's format and
    every operator were there already.
    """
    found = image_torch(image)
    if found is None or _minor(graph.torch) <= found:
        return
    strange = sorted(set(graph.operators) - OLDEST_OPERATORS)
    if graph.format > OLDEST_FORMAT:
        strange.append(f"file format {graph.format}")
    if strange:
        raise UserError(
            f"sandbox.image: {image} has torch {'.'.join(map(str, found))}, but the graph was made by {graph.torch} "
            f"and needs {', '.join(strange[:5])}; take a newer image, or serving.flavour=python"
        )


def image_torch(image: str) -> tuple[int, int] | None:
    """The torch of an NVIDIA image by its tag, as in "...tritonserver:22.08-pyt-python-py3"; None where unknown."""
    tag = re.search(r"tritonserver:(\d\d\.\d\d)(-|@|$)", image)
    if tag is None or tag[1] < next(iter(_IMAGE_TORCH)):
        return None
    return [torch_version for first, torch_version in _IMAGE_TORCH.items() if first <= tag[1]][-1]


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _graphs(module: Any) -> list[Any]:
    """The graphs of a module and of all within it; containers have none."""
    return [part.graph for part in module.modules() if part._c._has_method("forward")]


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _free_devices(graph: Any) -> None:
    """Replace each device that the tracer wrote down by that of the graph's first tensor."""
    fixed = [node for node in _nodes(graph) if node.kind() == "prim::Constant" and _is_device(node)]
    if not fixed:
        return
    tensor = next((value for value in graph.inputs() if value.type().isSubtypeOf(torch._C.TensorType.get())), None)
    if tensor is None:
        raise UserError("serving.flavour: torchscript: the graph has a device of its own; use serving.flavour=python")
    device = graph.create("prim::device", [tensor], 1)
    device.output().setType(torch._C.DeviceObjType.get())
    graph.prependNode(device)
    for node in fixed:
        node.output().replaceAllUsesWith(device.output())
        node.destroy()
    graph.lint()


def _is_device(node: Any) -> bool:
    return bool(node.output().type().kind() == "DeviceObjType")
