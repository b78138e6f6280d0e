"""python -m pipeline.serve MODEL_STORE: a reward server by hand; with --swap, a new reward model for a run."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError, run_command

EPILOG = """examples:
  python -m pipeline.serve runs/demo/model_store
  python -m pipeline.serve runs/demo/model_store --engine apptainer --devices 3 --set serving.dtype=float16
  python -m pipeline.serve --run runs/demo
  python -m pipeline.serve --swap path/to/new/model_store --run runs/demo
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.serve",
        description="Serve a model store until Ctrl-C or TERM; prints TRITON_HOST once the server has answered.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("store", nargs="?", type=Path, metavar="MODEL_STORE", help="what convert wrote (default: the run's)")
    add("--run", type=Path, metavar="RUN", help="use this run's configuration and sandbox, and serve its trainings")
    add("--swap", type=Path, metavar="MODEL_STORE", help="have RUN's server and training change to this store")
    add("--alone", action="store_true", help="with --swap: end the old server first, where both do not fit")
    add("--engine", choices=("venv", "apptainer", "singularity", "docker"), help="what tritonserver runs in")
    add("--bind", choices=("unix", "loopback", "network"), help="where it listens (default: unix)")
    add("--port", type=int, metavar="N", help="on this port (default: a free one)")
    add("--devices", default=None, metavar="LIST", help="GPUs, as in 0,1 (default: the last visible one; none: '')")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, as in serving.dtype=...")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = build_parser().parse_args(argv)
    if arguments.store is None and arguments.run is None:
        raise UserError("MODEL_STORE: give the folder that convert wrote, or --run RUN")
    if arguments.swap is not None and (arguments.run is None or arguments.store is not None):
        raise UserError("--swap: takes the new store, and --run the run that is to use it; nothing else")
    if arguments.alone and arguments.swap is None:
        raise UserError("--alone: says how to --swap; leave it out")
    if arguments.port is not None and not 0 <= arguments.port <= 65535:
        raise UserError(f"--port: {arguments.port} is no port; give one from 1 to 65535, or 0 for a free one")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    run = None
    if arguments.run is not None:
        from pipeline.status import open_run

        run = open_run(arguments.run)
    from pipeline.serving import by_hand

    given = arguments.swap or arguments.store
    if given is not None:
        by_hand.check_store(given)
    overrides = list(arguments.set)
    overrides += [f"serving.bind={arguments.bind}"] if arguments.bind else []
    overrides += [f"serving.grpc_port={arguments.port}"] if arguments.port is not None else []
    config = by_hand.configuration(run, arguments.store, arguments.engine, overrides)
    if arguments.swap is not None:
        from pipeline.serving import swap

        assert run is not None
        swap.announce(run, config, arguments.swap, arguments.alone, _say)
        return 0
    from pipeline.stages.devices import named_devices, visible_devices

    devices = visible_devices()[-1:] if arguments.devices is None else named_devices(arguments.devices, "--devices")
    by_hand.serve(run, arguments.store, config, devices, _say, own_sandbox=arguments.engine is not None)
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    run_command(main)
