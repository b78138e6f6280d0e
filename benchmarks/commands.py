"""How long the commands of the control plane take: `python benchmarks/commands.py RUN`, RUN being a finished run.

Whole processes, timed from outside; medians of several runs, each beside the target that it should stay under.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

TARGETS_S = {"submit --help": 0.4, "status": 0.4, "submit --stage all (nothing to do)": 1.5}


def main(argv: Sequence[str] | None = None) -> None:
    """Print one line a command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run directory")
    parser.add_argument("--times", type=int, default=7, help="runs of each command (default: 7)")
    arguments = parser.parse_args(argv)
    commands = {
        "submit --help": ["pipeline.submit", "--help"],
        "status": ["pipeline.status", str(arguments.run)],
        "submit --stage all (nothing to do)": ["pipeline.submit", "--stage", "all", "--run-dir", str(arguments.run)],
    }
    print(f"{'command':<38}{'median s':>9}{'min s':>8}{'max s':>8}{'target s':>10}")
    for name, command in commands.items():
        seconds = [time_command([sys.executable, "-m", *command]) for _ in range(arguments.times)]
        middle = statistics.median(seconds)
        print(f"{name:<38}{middle:>9.3f}{min(seconds):>8.3f}{max(seconds):>8.3f}{TARGETS_S[name]:>10.1f}")


def time_command(argv: list[str]) -> float:
    """Wall seconds of a command that must succeed."""
    started = time.monotonic()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


if __name__ == "__main__":
    main()
