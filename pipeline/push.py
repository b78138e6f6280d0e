"""python -m pipeline.push RUN: send what a run has trained to the Hugging Face hub, from where it can be reached."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.load import read_config
from pipeline.errors import UserError, run_command
from pipeline.status import open_run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.push", description="Push what a run has trained to the hub."
    )
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--to", metavar="OWNER/NAME", help="the repository; by default output.push_to_hub")
    parser.add_argument("--best", action="store_true", help="the policy of the best held-out reward, not the last one")
    arguments = parser.parse_args(argv)
    run = open_run(arguments.run)
    config = read_config(run.root)
    output = config.output
    repository = arguments.to or output.push_to_hub
    if repository is None:
        raise UserError("output.push_to_hub: names no repository; give one with --to owner/name")

    from pipeline.data.publish import push_folder, result_of
    from pipeline.run.sources import keeps_best, supervised_model

    stage, artifact = result_of(config)
    folder = run.artifact(stage, artifact)
    if stage != "train":
        folder = supervised_model(run, stage)  # the best, where it was kept
        if arguments.best and not keeps_best(run, stage):
            setting = f"{stage.replace('-', '_')}.save_best"
            raise UserError(f"--best: the stage {stage} kept no best model ({setting}); leave it out")
    elif arguments.best:
        folder = run.artifact(stage, "best")

    print(f"pushed to {push_folder(folder, repository, output.private)}")
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
