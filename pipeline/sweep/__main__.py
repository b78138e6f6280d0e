"""python -m pipeline.sweep DIR: the points of a sweep, their states and results."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import run_command
from pipeline.sweep.results import write_table


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and write it as sweep.json and sweep.csv into the folder."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.sweep", description="Show what a sweep came to.")
    parser.add_argument("folder", type=Path, help="the folder that --run-dir named with --sweep")
    arguments = parser.parse_args(argv)
    print(write_table(arguments.folder))
    return 0


if __name__ == "__main__":
    run_command(main)
