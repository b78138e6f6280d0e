"""The model that is made on the spot when `model.path` is "embedded": a BPE of the data and a random GPT-NeoX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run import atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
PAD = "<|padding|>"


def build_tokenizer(texts: Sequence[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`; any text can be encoded, and EOS and padding are two tokens.

    UserError when the texts give too few merges to fill `vocab_size`: ids without a token could be sampled.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise UserError(
            f"model.embedded.vocab_size: {vocab_size} is more than the {tokenizer.get_vocab_size()} tokens that the "
            "training texts give; lower it or use more data"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=max_length
    )


def build_model(config: Config, texts: Sequence[str], folder: Path) -> int:
    """Write a Hugging Face folder with a tokenizer of `texts` and a seeded random model of `config.model.embedded`.

    No dropout, embeddings untied, float32. Returns the number of parameters.
    """
    import torch
    from transformers import GenerationConfig, GPTNeoXConfig, GPTNeoXForCausalLM

    size = config.model.embedded
    tokenizer = build_tokenizer(texts, size.vocab_size, size.max_positions)
    architecture = GPTNeoXConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        intermediate_size=4 * size.hidden_size,
        max_position_embeddings=size.max_positions,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        classifier_dropout=0.0,
        tie_word_embeddings=False,
        use_cache=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # leaves the caller's generator as it was
        torch.manual_seed(config.seed)
        model = GPTNeoXForCausalLM(architecture)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.eos_token_id
    )
    with atomic.disk_errors(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
