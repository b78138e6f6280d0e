"""The two ways in which commands name a reward model: a run's, or that of a model store."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add --run and --model-store, of which one must be given."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="RUN", help="a run directory with a reward model")
    source.add_argument("--model-store", type=Path, metavar="STORE", help="a model store that convert wrote")
