"""The convert stage: turns the run's reward model into a Triton model store and proves that both agree.

python -m pipeline.serving.convert --run RUN --out DIR
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import heavy

if __name__ == "__main__":
    heavy.begin()  # before the imports below, which take seconds

import torch
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from pipeline.config.serving import Serving
from pipeline.errors import UserError
from pipeline.run.sources import checkpoint_base_path, reward_model_path
from pipeline.run.work import Progress, parse_work, write_result
from pipeline.serving import access, model_store, parity, torchscript
from pipeline.serving.prepare import check_labels, prepared
from pipeline.serving.scoring import CODE_VERSION, RewardModel

STORE = "model_store"

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Write DIR/model_store and record its identity and how well it agrees with the eager model."""
    run, config, out = parse_work("Convert the reward model into a Triton model store.", argv)
    progress = Progress(out, total=3, every_s=0.0)
    source, base, name = (
        reward_model_path(run, config),
        checkpoint_base_path(run, config),
        config.reward_model.checkpoint,
    )
    image = config.sandbox.image
    manifest = convert_checkpoint(source, base, out / STORE, config.serving, name, progress, image)
    values = {
        "identity": manifest.identity,
        "model_name": manifest.model_name,
        "flavour": manifest.flavour,
        "dtype": manifest.dtype,
        "weights_sha256": manifest.weights_sha256,
        "parity_max_difference": manifest.parity["max_difference"],
        "parity_allowed": manifest.parity["allowed"],
    }
    write_result(out, {STORE: STORE}, values)


def convert_checkpoint(
    source: Path,
    base: Path | None,
    store: Path,
    serving: Serving,
    checkpoint: str | None = None,
    progress: Progress | None = None,
    image: str | None = None,
) -> model_store.Manifest:
    """`convert` for any checkpoint that `prepared` reads; `base` has what it lacks of configuration and tokenizer."""
    transformers_logging.disable_progress_bar()
    with prepared(source, base, store.with_name(f"{store.name}.weights")) as folder:
        return convert(folder, store, serving, checkpoint, progress, image, origin=source)


def convert(
    source: Path,
    store: Path,
    serving: Serving,
    checkpoint: str | None = None,
    progress: Progress | None = None,
    image: str | None = None,
    origin: Path | None = None,
) -> model_store.Manifest:
    """Write a model store for the reward model in folder `source` and return its manifest, which names `origin`.

    `image` is what a TorchScript graph shall be served in.

    Raises UserError when the model is not a one-label classifier, has missing or unexpected weights or too few
    positions, or when the store's rewards differ from the eager float32 model's by more than is allowed.
    """
    report = progress.update if progress is not None else _no_progress
    check_config(source, serving.max_length, origin or source)
    shutil.rmtree(store, ignore_errors=True)  # an earlier, interrupted conversion
    name = model_store.model_name(serving, checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    report(0, "scoring with the eager model")
    reference_model = parity.load_reference(source, device)
    sequences = parity.probe_sequences(reference_model.get_input_embeddings().num_embeddings, serving.max_length)
    reference = [parity.reference_reward(reference_model, sequence) for sequence in sequences]
    del reference_model

    report(1, "writing the model store")
    folder = model_store.model_folder(store, name)
    model_store.place_model(source, folder, serving.dtype)
    identity = model_store.store_identity(folder, serving.dtype, CODE_VERSION, serving.flavour)
    model_store.write_config(store, name, model_store.render_config(serving, name, identity))
    graph = None
    if serving.flavour == "torchscript":
        graph = torchscript.write_graph(folder, serving.dtype, device)
        if image is not None:
            torchscript.check_image(image, graph)
    else:
        model_store.write_code(store, name)

    report(2, "comparing the two")
    score = _score_graph(folder, serving, device) if graph is not None else _score_model(folder, serving, device)
    found = parity.compare(score, sequences, reference)
    allowed = model_store.allowed_difference(serving.parity_tolerance, serving.dtype, reference)
    logger.info("%s: within %.3g of the eager model (%.3g allowed in %s)", name, found.largest, allowed, serving.dtype)
    if not found.largest <= allowed:  # also true for NaN
        raise UserError(
            f"serving.parity_tolerance: the model store's rewards differ from the eager model's by up to "
            f"{found.largest:.3g} ({found.length} tokens, batch of {found.batch}; {allowed:.3g} allowed in "
            f"{serving.dtype}); use serving.dtype=float32 or raise it"
        )
    manifest = model_store.Manifest(
        identity=identity,
        model_name=name,
        source=str(origin or source),
        weights_sha256=model_store.weights_sha256(folder),
        tokenizer_sha256=model_store.tokenizer_sha256(folder),
        flavour=serving.flavour,
        dtype=serving.dtype,
        max_length=serving.max_length,
        max_batch_tokens=serving.max_batch_tokens,
        max_batch_size=serving.max_batch_size,
        code_version=CODE_VERSION,
        versions=model_store.package_versions(),
        parity={
            "max_difference": found.largest,
            "worst_length": float(found.length),
            "worst_batch": float(found.batch),
            "mean_difference": found.mean,
            "allowed": allowed,
            "sequences": float(len(sequences)),
        },
        known_answers=[
            model_store.KnownAnswer(sequence, reward)
            for sequence, reward in zip(sequences, found.rewards, strict=True)
            if len(sequence) <= 33
        ],
        answer_tolerance=allowed,
        graph=asdict(graph) if graph is not None else None,
    )
    model_store.write_manifest(store, manifest)
    access.seal(store)
    report(3, "done")
    return manifest


def check_config(source: Path, max_length: int, origin: Path) -> None:
    """Check a model folder's config.json before anything is loaded; UserError with what is wrong, of `origin`."""
    path = source / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; reward_model.checkpoint must be a Hugging Face model folder")
    raw: dict[str, Any] = json.loads(path.read_text("utf-8"))
    architectures = raw.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise UserError(f"{path}: architectures is {architectures}; a reward model is a ...ForSequenceClassification")
    check_labels(raw, path)
    positions = raw.get("max_position_embeddings", raw.get("n_positions"))
    if positions is not None and max_length > positions:
        raise UserError(
            f"serving.max_length: {max_length} is more than the {positions} positions of {origin}; lower it"
        )


def _score_model(folder: Path, serving: Serving, device: str) -> parity.Score:
    """The flavour python's scoring code, one forward a call."""
    scorer = RewardModel(folder, device, serving.dtype, max_length=serving.max_length, attention=serving.attention)
    scorer.max_padding = 1.0

    def score(rows: list[list[int]]) -> list[float]:
        scorer.max_batch_size, scorer.max_batch_tokens = len(rows), len(rows) * max(map(len, rows))
        return scorer.score(rows)

    return score


def _score_graph(folder: Path, serving: Serving, device: str) -> parity.Score:
    gc.collect()  # a traced model is in cycles with its graph: it would stay beside the one that is loaded now
    vocab_size = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config().vocab_size
    file = torchscript.graph_file(folder)
    return torchscript.GraphModel(file, device, vocab_size, serving.max_length).score


def _no_progress(step: int, note: str = "") -> None:
    """Used where nobody follows."""


if __name__ == "__main__":
    heavy.run_and_leave(main)
