"""python -m pipeline.score --run RUN FILE: the rewards of any texts, by the run's server or in this process."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import run_command
from pipeline.model_source import add_source
from pipeline.run import atomic

EPILOG = """rows, one JSON object a line:
  {"text": "..."}                                        gets "reward"
  {"prompt": "...", "response": "..."}                   gets "reward"
  {"prompt": "...", "chosen": "...", "rejected": "..."}  gets "chosen_reward" and "rejected_reward"
  {"chosen": "...", "rejected": "..."}                   the same, for whole dialogues

examples:
  python -m pipeline.score --run runs/demo answers.jsonl --out scored.jsonl
  python -m pipeline.score --model-store runs/demo/model_store answers.jsonl
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.score",
        description="Score texts with a reward model. Each row comes back with its reward, in order.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_source(parser)
    add("file", type=Path, metavar="FILE", help="a .jsonl or .jsonl.gz file")
    add("--out", type=Path, metavar="FILE", help="where the rows go, whole or not at all (default: standard output)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = build_parser().parse_args(argv)
    if arguments.run is not None:
        from pipeline.status import open_run

        open_run(arguments.run)
    from pipeline.serving.texts import open_texts, read_rows

    rows = read_rows(arguments.file)
    if arguments.out is not None:
        atomic.check_writable(arguments.out, "--out")
    with open_texts(arguments.run, arguments.model_store) as (texts, _):
        rewards = iter(texts.score([pair for _, asked in rows for pair in asked.values()]))
        lines = [
            # Escaped: a field that was not scored may hold half of a surrogate pair, which no file takes.
            json.dumps({**row, **{name: next(rewards) for name in asked}})
            for row, asked in rows
        ]
    if arguments.out is None:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    else:
        atomic.write_text(arguments.out, "".join(f"{line}\n" for line in lines))
    return 0


if __name__ == "__main__":
    run_command(main)
