"""Rewards of texts that a person brings: read as the reward model reads responses in training.

A sequence is a prompt and a response, encoded apart, and the EOS where the reward is read. What is too long loses its
beginning. The spelling of a special token inside a text is ordinary characters.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.load import check, read_config
from pipeline.config.schema import Config
from pipeline.data.preferences import TURN, check_characters, read_jsonl
from pipeline.data.tokens import encode, end_id, load_tokenizer
from pipeline.errors import UserError
from pipeline.run import reward_models
from pipeline.run.directory import RunDir
from pipeline.run.sources import reward_model_path
from pipeline.serving import access, wire
from pipeline.serving.client import TRITON_HOST, TritonScorer, connect_scorer
from pipeline.serving.known import store_reference
from pipeline.serving.model_store import model_folder, read_manifest, serving_of
from pipeline.serving.pool import Place
from pipeline.serving.scorer import LocalScorer, Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK = 256
"""Sequences a call; they are sorted by length and cut into requests there."""
_AHEAD = 4
"""Calls that are under way at once."""
_CONNECT_S = 20.0

Asked = dict[str, tuple[str, str]]
"""Prompt and response by the name that their reward is to have in the row."""


@dataclass(frozen=True)
class TextScorer:
    """A source of rewards, and the tokenizer of its model."""

    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def sequence(self, prompt: str, response: str) -> list[int]:
        """The ids whose last one's score is the response's reward."""
        ids = [*encode(self.tokenizer, response), end_id(self.tokenizer)][-self.max_length :]
        room = self.max_length - len(ids)
        prompt_ids = encode(self.tokenizer, prompt) if prompt else []
        return prompt_ids[max(0, len(prompt_ids) - room) :] + ids

    def score(self, texts: Sequence[tuple[str, str]], report: Callable[[int], None] = lambda done: None) -> list[float]:
        """The reward of each (prompt, response), in order; `report` is told how many are there."""
        rewards: list[float] = []
        waiting: deque[Future[list[float]]] = deque()
        for start in range(0, len(texts), BLOCK):
            waiting.append(self.scorer.submit([self.sequence(*text) for text in texts[start : start + BLOCK]]))
            if len(waiting) >= _AHEAD:
                rewards += waiting.popleft().result()
                report(len(rewards))
        for future in waiting:
            rewards += future.result()
            report(len(rewards))
        return rewards


@contextlib.contextmanager
def open_texts(
    run: Path | None, store: Path | None, environ: Mapping[str, str] = os.environ
) -> Iterator[tuple[TextScorer, Config]]:
    """Rewards by a run's model, or by that of a model store, and the configuration that they are computed by.

    They come from $TRITON_HOST, else from the run's server where it has one, else from the model in this process.
    """
    if run is not None:
        directory, config = RunDir(run.resolve()), read_config(run)
        folder = present_model(directory, config)
        scorer = connect_scorer(directory, config, environ)
    else:
        assert store is not None
        manifest = read_manifest(store)
        access.check(store)
        folder = model_folder(store, manifest.model_name)
        config = check({"serving": serving_of(manifest)})
        named = environ.get(TRITON_HOST)
        if named:
            place = Place(wire.parse_address(named, tls=environ.get(wire.TLS_VARIABLE)))
            scorer = TritonScorer(
                lambda: [place], config.serving, store_reference(store, manifest.identity), _CONNECT_S
            )
        else:
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
            scorer = LocalScorer(folder, config.serving, device, manifest.identity)
    try:
        yield TextScorer(scorer, load_tokenizer(folder), config.serving.max_length), config
    finally:
        scorer.close()


def present_model(run: RunDir, config: Config) -> Path:
    """The folder of the reward model that the run uses, with its tokenizer: of its store, where it has one."""
    if reward_models.expected(run) is None:
        return reward_model_path(run, config)
    store = reward_models.store_of(run)
    return model_folder(store, read_manifest(store).model_name)


def read_rows(path: Path) -> list[tuple[dict[str, Any], Asked]]:
    """The rows of a .jsonl or .jsonl.gz file, and what each asks for. UserError names the line of one that cannot be
    understood, before anything is scored."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a .jsonl or .jsonl.gz file")
    rows = []
    for place, row in read_jsonl(path):
        try:
            rows.append((dict(row), asked(row)))
        except ValueError as fault:
            raise UserError(f"{place}: the row {fault}; correct or remove it") from None
    if not rows:
        raise UserError(f'{path}: is empty; it must hold rows such as {{"text": "..."}}')
    return rows


def asked(row: Mapping[str, Any]) -> Asked:
    """What a row asks for: {"text"}, or {"prompt"} with {"response"}, {"chosen"} or {"rejected"}, or whole dialogues
    as {"chosen"} and {"rejected"}. ValueError says what is wrong with another."""
    for key in ("text", "prompt", "response", "chosen", "rejected"):
        if row.get(key) is not None:
            if not isinstance(row[key], str):
                raise ValueError(f"has a '{key}' that is {type(row[key]).__name__}, not text")
            check_characters(key, row[key])
    given = [key for key in ("response", "chosen", "rejected") if row.get(key) is not None]
    prompt = row.get("prompt")
    if row.get("text") is not None:
        if given or prompt is not None:
            raise ValueError(f"has 'text' and '{(given or ['prompt'])[0]}'; which of them is meant?")
        return {"reward": ("", row["text"])}
    if not given:
        raise ValueError(f"has nothing to score; its keys are: {', '.join(map(str, row)) or 'none'}")
    if prompt is None and given[0] == "response":
        raise ValueError("has a 'response' without its 'prompt'; a text without one is a 'text'")
    pairs = {key: _turn(prompt, row[key]) if prompt is not None else _dialogue(key, row[key]) for key in given}
    return {"reward" if key == "response" else f"{key}_reward": pair for key, pair in pairs.items()}


def _turn(prompt: str, response: str) -> tuple[str, str]:
    """A prompt that ends with the assistant's turn is followed by one space, as in training; others by nothing."""
    if prompt.rstrip().endswith(TURN.strip()):
        return prompt.rstrip(), f" {response.strip()}"
    return prompt, response


def _dialogue(key: str, text: str) -> tuple[str, str]:
    start = text.rfind(TURN)
    if start < 0:
        raise ValueError(f"has no 'prompt', and its '{key}' no '\\n\\nAssistant:' turn to split it at")
    return _turn(text[: start + len(TURN)], text[start + len(TURN) :])
