"""python -m pipeline.rm_eval --run RUN: a reward model's accuracy, margin and calibration on preference pairs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError, run_command
from pipeline.model_source import add_source

EPILOG = """pairs: HH's rows, {"chosen", "rejected"} or {"prompt", "chosen", "rejected"}; or RewardBench's, which have a
"subset" too, and get a score by subset and by category.

examples:
  python -m pipeline.rm_eval --run runs/demo
  python -m pipeline.rm_eval --run runs/demo --data reward-bench/data --out judged.json
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.rm_eval",
        description="Judge a reward model by preference pairs. Ties count as half right.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_source(parser)
    add(
        "--data",
        type=Path,
        metavar="FILE|FOLDER",
        help=".jsonl, .jsonl.gz or .parquet; of a folder its test split (default: the run's test split)",
    )
    add("--out", type=Path, metavar="FILE", help="write the report as JSON too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = build_parser().parse_args(argv)
    if arguments.run is not None:
        from pipeline.status import open_run

        run = open_run(arguments.run)
    elif arguments.data is None:
        raise UserError("--data: a model store has no test split; name the pairs to judge it by")
    from pipeline.data.preferences import read_split
    from pipeline.evaluation.pairs import of_preference, read_pairs
    from pipeline.evaluation.reward_model import judge, render
    from pipeline.serving.texts import open_texts

    if arguments.data is not None:
        pairs = read_pairs(arguments.data)
    else:
        pairs = [of_preference(preference) for preference in read_split(run, "test")]
    if len(pairs) < 2:
        raise UserError(f"{arguments.data or arguments.run}: has {len(pairs)} pair; an interval needs at least 2")
    with open_texts(arguments.run, arguments.model_store) as (texts, _):
        answers = [answer for pair in pairs for answer in ((pair.prompt, pair.chosen), (pair.prompt, pair.rejected))]
        rewards = texts.score(answers)
    report = judge(pairs, rewards[::2], rewards[1::2])
    print(render(report))
    if arguments.out is not None:
        from pipeline.run import atomic

        atomic.write_json(arguments.out, report)
    return 0


if __name__ == "__main__":
    run_command(main)
