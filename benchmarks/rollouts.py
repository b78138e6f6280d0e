"""The decode loop against transformers.generate: `python benchmarks/rollouts.py --data FOLDER [--prompts N]`.

Prompts are a data folder's (train.jsonl[.gz]) in a tokenizer trained on it, and each answer is as long as the data
set's own answer to the prompt, up to --new tokens. A random model does not end by itself, so this one counts down:
input embeddings are large, so that the last hidden state is nearly the last id's embedding, and the head's rows are set
so that "n to go" is followed by "n - 1 to go" and, after the last, by the ids of a stop sequence. A prompt's last id
says how many. That is a model with plain weights: both sides load the same one, sample from its softmax, and pay for
all of its layers. Behind the stop sequence it counts on, as a real one would.

Three cases: answers that end with a stop sequence and no EOS (what a model says that was trained as the original's is),
answers that end with EOS, and answers that never end. transformers.generate gets the prompts in batches of --rows, in
the data's order or, --sorted, by length, and what suits it best: --new tokens a row and the text cut afterwards
("plain"), or stop_strings. Useful tokens are those up to the end. All sides run in each round, one after the other; a
ratio is of one round, against the better of generate's ways.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from _common import add_data_options, add_options, parser_of, read_data

from pipeline.config.training import Generate
from pipeline.data.preferences import Preference
from pipeline.data.tokens import encode, end_id
from pipeline.errors import run_command
from pipeline.training.decode import decode
from pipeline.training.split import split_model
from pipeline.training.stopping import StopSequences

STOPS = Generate().stop_sequences
LAST_WORDS = STOPS[0]
LENGTH = 1024
CASES = {"stop": ">= 2", "eos": ">= 2", "none": ">= 1"}
"""How answers end, and what is aimed at."""


@dataclass(frozen=True)
class Work:
    """What both sides are to sample."""

    model: Any
    tokenizer: Any
    prompts: list[list[int]]
    lengths: list[int]
    """Useful tokens of each answer."""
    rows: int
    generate: Generate


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table a case."""
    parser = parser_of(__doc__)
    add_data_options(parser, vocabulary="8192")
    parser.add_argument("--prompts", type=int, default=128, help="prompts a round (default: 128)")
    parser.add_argument("--rows", type=int, default=32, help="rows side by side (default: 32)")
    parser.add_argument("--new", type=int, default=128, help="tokens of the longest answer (default: 128)")
    parser.add_argument("--layers", type=int, default=12, help="layers of the GPT-NeoX (default: 12)")
    parser.add_argument("--hidden", type=int, default=256, help="its width (default: 256)")
    add_options(parser, rounds=(5, "rounds"), threads=1)
    parser.add_argument("--sorted", action="store_true", help="give generate prompts of like length together")
    parser.add_argument("--case", choices=CASES, action="append", help="only this case; may be repeated")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {options.threads} thread(s)"
    print(f"{where}; {options.layers} layers x {options.hidden}; {options.prompts} prompts, {options.rows} rows side "
          f"by side, up to {options.new} new tokens; {options.rounds} rounds")  # fmt: skip
    preferences, tokenizer = read_data(options.data, options.vocabulary or 8192, LENGTH)
    for case in options.case or CASES:
        work = make_work(options, case, tokenizer, preferences[: options.prompts])
        sides = sides_of(work, case, options.sorted)
        rounds = [{name: seconds(work, side) for name, side in sides.items()} for _ in range(options.rounds)]
        print_table(case, work, rounds)


def make_work(options: argparse.Namespace, case: str, tokenizer: Any, preferences: Sequence[Preference]) -> Work:
    """Prompts, lengths and the model that ends its answers as `case` says."""
    end = end_id(tokenizer)
    ending = {"stop": encode(tokenizer, LAST_WORDS), "eos": [end], "none": []}[case]
    countdown = countdown_ids(tokenizer, options.new + 1)
    prompts, lengths = [], []
    for preference in preferences:
        said = len(encode(tokenizer, preference.chosen))
        length = min(options.new, said + len(ending)) if ending else options.new
        before = max(0, length - len(ending))  # tokens that are sampled before the ending begins
        room = LENGTH - options.new - 1
        prompts.append([*encode(tokenizer, preference.prompt)[-room:], countdown[before]])
        lengths.append(max(length, len(ending)))
    # "n to go" is countdown[n]; where answers never end, the count starts again.
    chain = [*reversed(countdown), *(ending or []), countdown[-1]]
    model = counting_model(options, len(tokenizer), chain)
    return Work(model, tokenizer, prompts, lengths, options.rows, Generate(max_new_tokens=options.new))


def countdown_ids(tokenizer: Any, count: int) -> list[int]:
    """Ids of words that no stop sequence needs."""
    words = [token for token in range(len(tokenizer)) if tokenizer.decode([token]).strip().isalpha()]
    taken = {token for stop in STOPS for token in encode(tokenizer, stop)}
    return [token for token in words if token not in taken][-count:]


def counting_model(options: argparse.Namespace, vocabulary: int, chain: Sequence[int]) -> Any:
    """A GPT-NeoX whose every layer is random, and that says `chain` from wherever in it the last id is."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=options.hidden, intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=max(1, options.hidden // 64),
        max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight  # (V, H)
        embedding.normal_()
        for token, following in itertools.pairwise(chain):
            head[following] += embedding[token] * (50.0 / options.hidden)
    if torch.cuda.is_available():
        return model.to("cuda", torch.bfloat16)
    return model


Side = Callable[[], list[int]]
"""Samples everything; returns the number of useful tokens of each answer."""


def sides_of(work: Work, case: str, by_length: bool) -> dict[str, Side]:
    """The sides by name."""
    split = split_model(work.model, 1)
    stops = StopSequences(work.tokenizer, STOPS)
    end = end_id(work.tokenizer)
    order = list(range(len(work.prompts)))
    if by_length:
        order.sort(key=lambda row: -len(work.prompts[row]))
    batches = [order[start : start + work.rows] for start in range(0, len(order), work.rows)]

    def ours() -> list[int]:
        noise = torch.Generator().manual_seed(0)
        responses = decode(split, work.prompts, work.generate, stops, end, noise, side_by_side=work.rows)
        return [len(response.tokens) for response in responses]

    def theirs(**settings: Any) -> list[int]:
        lengths = dict.fromkeys(order, 0)
        for rows in batches:
            answers = generate(work, [work.prompts[row] for row in rows], **settings)
            lengths |= zip(rows, (useful(answer, stops, end) for answer in answers), strict=True)
        return [lengths[row] for row in range(len(lengths))]

    sides: dict[str, Side] = {"decode": ours, "generate, plain": theirs}
    if case != "none":
        sides["generate, stop_strings"] = lambda: theirs(stop_strings=list(STOPS), tokenizer=work.tokenizer)
    return sides


def generate(work: Work, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    """One batch of transformers.generate, padded on the left."""
    width = max(map(len, prompts))
    device = work.model.device
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    with torch.inference_mode():
        out = work.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=work.generate.max_new_tokens,
            pad_token_id=0,
            **settings,
        )
    answers: list[list[int]] = out[:, width:].tolist()
    return answers


def useful(answer: list[int], stops: StopSequences, end: int) -> int:
    """Tokens up to EOS or up to the one that completes a stop sequence."""
    for count in range(1, len(answer) + 1):
        if answer[count - 1] == end or stops.completed_by(answer[:count]):
            return count
    return len(answer)


def seconds(work: Work, side: Side) -> float:
    """Wall seconds of a side, which must have sampled what was to be sampled."""
    started = time.perf_counter()
    lengths = side()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - started
    if lengths != work.lengths:
        raise RuntimeError(f"answers of {sum(lengths)} tokens were sampled, not of {sum(work.lengths)}")
    return elapsed


def print_table(case: str, work: Work, rounds: list[dict[str, float]]) -> None:
    """Each side's speed, and the ratio beside its aim."""
    tokens, prompts = sum(work.lengths), [len(prompt) for prompt in work.prompts]
    print(f"\nanswers end: {case}; prompts of {min(prompts)} to {max(prompts)} tokens (mean "
          f"{statistics.mean(prompts):.0f}), answers of {min(work.lengths)} to {max(work.lengths)} (mean "
          f"{tokens / len(prompts):.0f})\n")  # fmt: skip
    print(f"{'side':<26}{'median s':>10}{'useful tokens/s':>17}")
    for side in rounds[0]:
        middle = statistics.median(one[side] for one in rounds)
        print(f"{side:<26}{middle:>10.2f}{tokens / middle:>17.1f}")
    ratios = [min(value for side, value in one.items() if side != "decode") / one["decode"] for one in rounds]
    print(f"\n{'figure':<26}{'median':>9}{'min':>9}{'max':>9}   aim")
    print(f"{'decode / better generate':<26}{statistics.median(ratios):>9.2f}{min(ratios):>9.2f}{max(ratios):>9.2f}   "
          f"{CASES[case]}")  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_command(main)
