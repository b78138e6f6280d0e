"""python -m pipeline.doctor: look at this machine and site, and say what will not work and how to mend it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.names import SUMMARY, chosen_preset
from pipeline.errors import UserError, run_command

if TYPE_CHECKING:  # importing these takes longer than printing --help may
    from pipeline.site.examine import Site

EPILOG = """examples:
  python -m pipeline.doctor
  python -m pipeline.doctor --write-profile my-cluster.yaml
  python -m pipeline.doctor --cluster my-cluster.yaml --preset 6B --run-dir runs/6B

exit status: 0 when nothing stands in the way, 1 when something will not work, 2 for a wrong command line
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.doctor",
        description="Look at this machine and site; say what will not work and how to mend it. Submits nothing.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cluster", metavar="NAME|FILE", help="cluster profile: a name in slurm/, or a YAML file (default: local)")
    add("--preset", metavar="NAME", help=f"what is to be run (default: the run's, $CONFIG_NAME or gptj): {SUMMARY}")
    add("--run-dir", type=Path, metavar="DIR", help="where the run is, or is to be (default: runs/<preset>)")
    add("--write-profile", type=Path, metavar="FILE", help="draft a profile from what is seen, and examine that one")
    add("--json", action="store_true", help="print the findings as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 1 when something will not work."""
    arguments = build_parser().parse_args(argv)
    from pipeline.run.directory import RunDir
    from pipeline.site import examine
    from pipeline.site.findings import fails, render
    from pipeline.submit import resolve_config

    target: Path | None = arguments.write_profile
    if target is not None and arguments.cluster is not None:
        raise UserError("--write-profile: examines the profile that it drafts; leave out --cluster")
    if target is not None:
        refuse_existing(target)
    run = RunDir(Path(os.path.abspath(arguments.run_dir or Path("runs") / chosen_preset(arguments.preset))))
    config = resolve_config(run, arguments.preset, (), arguments.cluster)  # before asking anyone: it may be wrong
    site = examine.look()
    if target is not None:
        write_profile(site, target)
        config = resolve_config(run, arguments.preset, (), str(target))
    findings = examine.examine(site, run, config)
    if arguments.json:
        print(json.dumps([asdict(each) for each in findings], indent=2, ensure_ascii=False))
    else:
        about = f"preset {config.preset}, cluster {config.cluster.name}, run directory {run.root}"
        print(f"{'drafted ' + str(target) + '; ' if target else ''}{about}\n")
        width = min(120, shutil.get_terminal_size((120, 24)).columns)
        print(render(findings, colour=sys.stdout.isatty(), width=width))
        if target is not None:
            print(f"read and correct {target}, then: python -m pipeline.doctor --cluster {shlex.quote(str(target))}")
    return 1 if fails(findings) else 0


def refuse_existing(target: Path) -> None:
    """UserError when the file is there: a person may have corrected it."""
    if target.exists():
        raise UserError(f"--write-profile {target}: exists already and is not overwritten; name another file")


def write_profile(site: Site, target: Path) -> None:
    """Draft a profile into a new file."""
    from pipeline.run import atomic
    from pipeline.site.draft import Seen, draft

    refuse_existing(target)
    interfaces = [name for _, name in socket.if_nameindex()]
    atomic.write_text(target, draft(Seen(site.slurm, site.engine, interfaces, os.environ)))


if __name__ == "__main__":
    run_command(main)
