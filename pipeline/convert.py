"""python -m pipeline.convert: any reward model as a Triton model store, without a run."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError, run_command
from pipeline.run import atomic

if TYPE_CHECKING:  # importing these takes longer than printing --help may
    from pipeline.config.schema import Config

EPILOG = """examples:
  python -m pipeline.convert --base-model EleutherAI/gpt-j-6B --checkpoint Dahoas/gptj-rm-static --revision 676bfd4d
  python -m pipeline.convert --checkpoint runs/demo/models/reward-model --dtype float32 --max-length 256
"""
_SECTION = "serving."


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.convert",
        description="Turn a reward model into a Triton model store.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR|FILE|HUB-ID", help="the reward model")
    add("--revision", metavar="NAME", help="branch, tag or commit of a hub id (default: its main branch)")
    add("--base-model", "--base_model", metavar="DIR|HUB-ID", help="whose config.json and tokenizer to take, if needed")
    add("--base-revision", metavar="NAME", help="the same as --revision, of the base model")
    add("--out", type=Path, default=Path("model_store"), metavar="DIR", help="the store (default: model_store)")
    add("--model-name", metavar="NAME", help="its name in Triton (default: the checkpoint's last component)")
    add("--dtype", metavar="NAME", help="of the served weights (default: bfloat16)")
    add("--max-length", metavar="N", help="tokens of the longest sequence (default: 1024)")
    add("--flavour", metavar="NAME", help="the Triton backend (default: python)")
    add("--image", metavar="IMAGE", help="what a torchscript graph shall be served in (default: sandbox.image's)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting, as in serving.num_threads=4")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = build_parser().parse_args(argv)
    config = _config(arguments)
    if arguments.base_revision is not None and arguments.base_model is None:
        raise UserError(f"--base-revision {arguments.base_revision}: is of --base-model, which is not given")
    serving = config.serving
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    from pipeline.run.lock import lock
    from pipeline.serving.model_store import model_name

    out = arguments.out.resolve()
    name = model_name(serving, arguments.checkpoint)
    _check_place(out, name)
    with lock(out.with_name(f".{out.name}.lock"), f"converting {arguments.checkpoint}"):
        source = _fetch("reward_model", "--checkpoint", arguments.checkpoint, arguments.revision)
        base = None
        if arguments.base_model is not None:
            base = _fetch("checkpoint_base", "--base-model", arguments.base_model, arguments.base_revision)
        from pipeline.serving.convert import convert_checkpoint

        with atomic.new_folder(out) as fresh:
            manifest = convert_checkpoint(
                source, base, fresh, serving, arguments.checkpoint, image=config.sandbox.image
            )
    print(
        f"{arguments.out}/{name}: {manifest.dtype}, at most {manifest.parity['max_difference']:.1e} from the eager "
        f"model; identity {manifest.identity[:12]}"
    )


def _config(arguments: argparse.Namespace) -> Config:
    """The settings of the store: options, and overrides of serving.*; and the image that it is for."""
    from pipeline.config.load import resolve

    for text in arguments.set:
        if not text.startswith(_SECTION):
            raise UserError(f"--set {text}: only settings of serving.* enter a model store")
    options = ("model_name", "dtype", "max_length", "flavour")
    named = [(option, getattr(arguments, option)) for option in options]
    overrides = [f"{_SECTION}{option}={value}" for option, value in named if value is not None]
    if arguments.image is not None:
        overrides.append(f"sandbox.image={arguments.image}")
    return resolve({}, [*overrides, *arguments.set])


def _check_place(out: Path, name: str) -> None:
    """Refuse to replace what is not an earlier store of the same model, and what nobody can write."""
    atomic.check_writable(out, "--out")
    if not out.exists():
        return
    manifest = out / "manifest.json"
    try:
        old = json.loads(manifest.read_text("utf-8"))["model_name"]
    except (OSError, ValueError, KeyError, TypeError):
        if out.is_dir() and not any(out.iterdir()):
            return
        raise UserError(f"--out {out}: exists and is not a model store; give another folder") from None
    if old != name:
        raise UserError(f"--out {out}: is the store of {old}, not of {name}; give another folder, or remove it")


def _fetch(key: str, option: str, name: str, revision: str | None) -> Path:
    """A folder (or file) as it is, or the snapshot of a hub id."""
    from pipeline.data.snapshots import fetch_model

    path = Path(name).expanduser()
    if path.exists():
        if revision is not None:
            revision_option = "--revision" if key == "reward_model" else "--base-revision"
            raise UserError(
                f"{revision_option} {revision}: is of a hub id, and {option} {name} is a folder or file; leave it out"
            )
        return path.resolve()
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{option}: {name}: no such file or folder")
    pin = fetch_model(key, name, revision, None, option)
    logging.getLogger(__name__).info("%s: commit %s", name, pin.commit)
    return Path(pin.folder)


if __name__ == "__main__":
    run_command(main)
