"""Known answers: how a client makes sure that a server serves the model that it should, before it believes a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tritonclient.grpc as triton

from pipeline.config.serving import Serving
from pipeline.errors import UserError
from pipeline.run import reward_models
from pipeline.run.directory import RunDir
from pipeline.serving import wire
from pipeline.serving.model_store import MANIFEST, KnownAnswer, Manifest, allowed_difference, read_manifest
from pipeline.serving.scorer import cut

PROBE_S = 10.0
"""How long a server may take to say which model it serves: that waits behind nobody's work."""

_PROBES = tuple([1 + place % 9 for place in range(length)] for length in (1, 2, 7, 33))
"""What is asked where no answer is known yet, in ids that every vocabulary has."""


@dataclass(frozen=True)
class Reference:
    """What is known of the right model; nothing, of a server that other people run for a run that converts none."""

    identity: str | None = None
    answers: tuple[KnownAnswer, ...] = ()
    tolerance: float = 0.0


def run_reference(run: RunDir, identity: str | None = None) -> Reference:
    """What the manifest says of the model with this identity: by default of that which the run is to use."""
    identity = identity or reward_models.expected(run)
    model, outputs = reward_models.announced(run, identity) if identity else None, run.outputs("convert")
    if model is not None:
        store = Path(model.store)
    elif outputs is not None and "model_store" in outputs.artifacts:
        store = run.root / outputs.artifacts["model_store"].path
    else:
        return Reference(identity)
    return store_reference(store, identity)


def store_reference(store: Path, identity: str | None) -> Reference:
    """What a store says of its model; the identity alone where it was purged: a server elsewhere may still have it."""
    if not (store / MANIFEST).exists():
        return Reference(identity)
    manifest = read_manifest(store)
    return Reference(identity, tuple(manifest.known_answers), manifest.answer_tolerance)


def examine(
    client: triton.InferenceServerClient, address: wire.Address, reference: Reference, serving: Serving
) -> tuple[Reference, Serving]:
    """Ask a server for its model's identity and the known answers.

    Returns the reference, with what it did not know as this server has it: later connections are held to that. And
    the settings within which this server takes requests.
    Raises UserError for another model or a wrong answer, InferenceServerException when the server cannot be asked.
    """
    parameters = wire.served_parameters(client, address.model, min(PROBE_S, serving.request_timeout_s))
    identity = parameters.get("identity")
    if reference.identity is not None and identity != reference.identity:
        raise UserError(
            f"{address}: serves another reward model ({_short(identity)}) than this run is to use "
            f"({_short(reference.identity)}); start that model's server, or unset TRITON_HOST"
        )
    serving = within(serving, parameters)
    if reference.answers:
        rewards = ask(client, address, [answer.tokens for answer in reference.answers], serving)
        pairs = zip(rewards, reference.answers, strict=True)
        difference = max(abs(reward - answer.reward) for reward, answer in pairs)
        if difference > reference.tolerance:
            raise UserError(
                f"{address}: rewards are off by {difference:.3g} from the known answers ({reference.tolerance:.3g} "
                "allowed): the server is damaged, or serves another model; restart it with the run's model store"
            )
        return replace(reference, identity=identity), serving
    probes = [probe[-serving.max_length :] for probe in _PROBES]
    rewards = ask(client, address, probes, serving)
    tolerance = allowed_difference(serving.parity_tolerance, parameters.get("dtype", "bfloat16"), rewards)
    answers = tuple(KnownAnswer(probe, reward) for probe, reward in zip(probes, rewards, strict=True))
    return Reference(identity, answers, tolerance), serving


def within(serving: Serving, parameters: Mapping[str, str]) -> Serving:
    """A client's settings within the limits of a served model, and cut as its flavour needs it."""
    limits: dict[str, Any] = {}
    for name in ("max_batch_tokens", "max_batch_size"):
        served = parameters.get(name, "")
        if served.isdecimal() and int(served) > 0:
            limits[name] = min(int(served), getattr(serving, name))
    if parameters.get("backend") == "pytorch":
        limits["flavour"] = "torchscript"
    return serving.model_copy(update=limits)


def within_store(serving: Serving, manifest: Manifest) -> Serving:
    """The same, of the server of a model store."""
    limits = {name: str(getattr(manifest, name)) for name in ("max_batch_tokens", "max_batch_size")}
    return within(serving, {**limits, "backend": "pytorch" if manifest.flavour == "torchscript" else "python"})


def ask(
    client: triton.InferenceServerClient, address: wire.Address, sequences: Sequence[list[int]], serving: Serving
) -> list[float]:
    """The rewards that a server gives, in `requests_for` requests. Raises as `examine` does."""
    rewards = [0.0] * len(sequences)
    try:
        for some in cut([len(sequence) for sequence in sequences], serving):
            rows = [sequences[index] for index in some]
            answers = wire.infer(client, address.model, rows, serving.request_timeout_s)
            for index, reward in zip(some, answers, strict=True):
                rewards[index] = reward
    except UserError as error:
        raise UserError(f"{address}: a known question was answered wrongly: {error}") from error
    return rewards


def requests_for(sequences: Sequence[Sequence[int]], serving: Serving) -> int:
    """How many requests `ask` makes of them: how much a request may hold is the user's to set."""
    return len(cut([len(sequence) for sequence in sequences], serving))


def _short(identity: str | None) -> str:
    return identity[:12] if identity else "without an identity"
