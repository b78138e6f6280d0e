"""What ILQL leaves: a Hugging Face folder of the language model, with the heads that steer its decoding beside it.

policy/                       config.json, model.safetensors, tokenizer, ...: AutoModelForCausalLM loads it alone
policy/ilql_heads.safetensors weights under trlX's names: q_heads.*, target_q_heads.*, v_head.*
policy/ilql.json              the beta to decode with, and the heads' sizes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.config.methods import ILQL
from pipeline.config.training import Generate
from pipeline.data.tokens import encode, end_id, load_tokenizer
from pipeline.errors import UserError
from pipeline.run import atomic
from pipeline.training.decode import decode
from pipeline.training.ilql_decoding import Steering, steer
from pipeline.training.ilql_heads import Heads, TargetHeads
from pipeline.training.models import disable_dropout, load_causal_lm
from pipeline.training.split import Split, split_model
from pipeline.training.stopping import StopSequences, decode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEADS, SETTINGS = "ilql_heads.safetensors", "ilql.json"
_TARGETS = "target_"


@dataclass(frozen=True)
class ILQLPolicy:
    """A trained policy: the language model, its heads, and the beta that they steer with."""

    split: Split
    tokenizer: PreTrainedTokenizerBase
    heads: Heads
    targets: TargetHeads
    beta: float

    def steering(self, beta: float | None = None) -> Steering:
        """What changes the scores that `decode` samples from; None takes the policy's own beta."""
        return steer(self.targets, self.beta if beta is None else beta, self.split.whole.dtype)

    def answer(
        self, prompts: Sequence[str], generate: Generate | None = None, beta: float | None = None, seed: int = 0
    ) -> list[str]:
        """A sampled answer to each prompt, up to its stop sequence. A prompt ends with "Assistant:"."""
        generate = generate or Generate()
        stops = StopSequences(self.tokenizer, generate.stop_sequences)
        end = end_id(self.tokenizer)
        responses = decode(
            self.split,
            [encode(self.tokenizer, prompt) for prompt in prompts],
            generate,
            stops,
            end,
            torch.Generator(device=self.split.device).manual_seed(seed),
            adjust=self.steering(beta),
        )
        texts = [decode_text(self.tokenizer, [id for id in response.tokens if id != end]) for response in responses]
        return [text[: stops.find(text)] for text in texts]


def save_heads(heads: Heads, targets: TargetHeads, settings: ILQL, folder: Path) -> None:
    """Add the heads, in float32, and the settings to the folder of the language model."""
    named = dict(heads.state_dict())
    named |= {f"{_TARGETS}{name}": weight for name, weight in targets.state_dict().items()}
    weights = {name: weight.detach().to("cpu", torch.float32).contiguous() for name, weight in named.items()}
    vocab_size, width = heads.q_heads[0][2].weight.shape  # type: ignore[index]
    sizes = {"hidden_size": int(width) // 2, "vocab_size": int(vocab_size), "two_qs": len(heads.q_heads) == 2}
    with atomic.disk_errors(folder):
        save_file(weights, folder / HEADS)
    atomic.write_json(folder / SETTINGS, {"beta": decoding_beta(settings), "betas": list(settings.betas), **sizes})


def decoding_beta(settings: ILQL) -> float:
    """The beta that the best checkpoint is chosen by, and that the policy decodes with."""
    return settings.betas[-1] if settings.best_beta is None else settings.best_beta


def load_ilql(folder: Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ILQLPolicy:
    """Load a policy that ILQL trained, to decode with; by default on a GPU in bf16 or on the CPU in float32.

    UserError when the folder holds no such policy, or weights do not fit.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    model = load_causal_lm(folder, dtype)
    disable_dropout(model)
    heads, targets, beta = load_heads(folder)
    split = split_model(model.to(place), 1)
    return ILQLPolicy(split, load_tokenizer(folder), heads.to(place), targets.to(place), beta)


def has_heads(folder: Path) -> bool:
    """Whether the model in `folder` was trained by ILQL, so that decoding it alone would be another policy."""
    return (folder / SETTINGS).is_file() or (folder / HEADS).is_file()


def load_heads(folder: Path) -> tuple[Heads, TargetHeads, float]:
    """Heads, target heads and beta of a policy folder, on the CPU; UserError when they are not there or do not fit."""
    raw: Any = atomic.read_json(folder / SETTINGS)
    try:
        heads = Heads(raw["hidden_size"], raw["vocab_size"], raw["two_qs"], seed=0)
        targets, beta = TargetHeads(heads), float(raw["beta"])
        weights = load_file(folder / HEADS)
        heads.load_state_dict({name: weight for name, weight in weights.items() if not name.startswith(_TARGETS)})
        targets.load_state_dict(
            {name.removeprefix(_TARGETS): weight for name, weight in weights.items() if name.startswith(_TARGETS)}
        )
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: holds no whole ILQL heads ({reason}); give a folder that ILQL wrote") from None
    return heads.eval().requires_grad_(False), targets, beta
