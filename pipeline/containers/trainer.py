"""A stage's work inside the trainer's image (`cluster.trainer_image`), by Apptainer or Singularity.

The image brings Python and the packages; the code comes from the run directory, as it was submitted.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline import procs
from pipeline.config.schema import Config
from pipeline.containers.command import Bind, exec_argv, guarded
from pipeline.containers.source import Source, content_digest
from pipeline.errors import UserError
from pipeline.run import provenance
from pipeline.run.directory import RunDir
from pipeline.run.hashing import HashCache
from pipeline.run.sources import pins

_CODE = Path(__file__).resolve().parents[2]
_ENGINES = ("apptainer", "singularity")
_HOST_PYTHON = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "CONDA_PREFIX", "__PYVENV_LAUNCHER__")

# Between us and the work is the engine's own process: it is that one's death that the work must not outlive.
_BOUND_TO_ENGINE = f'{procs.PARENT_MARK}=$PPID exec "$@"'


def in_image(
    argv: Sequence[str], env: Mapping[str, str], run: RunDir, config: Config
) -> tuple[list[str], dict[str, str]]:
    """The command and its environment, moved into the trainer's image where the profile names one.

    The GPUs, the home folder and /tmp are the host's, as are the run directory, the caches, and the folders that the
    configuration names. UserError when the image or an engine is missing.
    """
    image = config.cluster.trainer_image
    if image is None:
        return list(argv), dict(env)
    if not Path(image).exists():
        raise UserError(f"cluster.trainer_image: {image}: no such image here; build it from containers/trainer.def")
    site = config.cluster.engine
    engine = site if site in _ENGINES else next((name for name in _ENGINES if shutil.which(name)), None)
    if engine is None:
        raise UserError(f"cluster.trainer_image: neither {' nor '.join(_ENGINES)} is on PATH; load its module in setup")
    inside = {key: value for key, value in env.items() if key not in _HOST_PYTHON}
    inside |= {"PYTHONPATH": str(_CODE), "PYTHONNOUSERSITE": "1"}
    folders = [*_folders(run, config, env), *(Path(os.path.expandvars(name)) for name in config.cluster.binds)]
    outermost = [folder for folder in dict.fromkeys(folders) if not any(other in folder.parents for other in folders)]
    binds = [Bind(folder, str(folder), writable=True) for folder in outermost if folder.exists()]
    start = exec_argv(engine, image, binds, gpus=bool(env.get("CUDA_VISIBLE_DEVICES")), own_environment=False)
    command = ["python3" if word == sys.executable else word for word in argv]
    return guarded([*start, "sh", "-c", _BOUND_TO_ENGINE, "sh", *command]), inside


def image_digest(config: Config, hashes: HashCache) -> str | None:
    """Identifies the content of the trainer's image; None without one, or where it is not on this machine."""
    image = config.cluster.trainer_image
    if image is None or not Path(image).exists():
        return None
    path = Path(image).resolve()
    return content_digest(Source("folder" if path.is_dir() else "sif", image, path), hashes)


def check_image(run: RunDir, config: Config, digest: str | None) -> None:
    """UserError when the image has become another one since its jobs were submitted."""
    submitted = provenance.trainer_image(run)
    if digest is None or submitted is None or submitted["file"] != config.cluster.trainer_image:
        return
    if submitted["digest"] != digest:
        raise UserError(
            f"cluster.trainer_image: {submitted['file']}: it has changed since this was submitted "
            f"({submitted['digest'][:12]} to {digest[:12]}); submit again to go on in the new one"
        )


def _folders(run: RunDir, config: Config, env: Mapping[str, str]) -> list[Path]:
    """What a work reads and writes outside of its image."""
    named = [config.model.path, config.model.tokenizer_path, config.data.source, config.reward_model.checkpoint]
    named += [
        config.reward_model.checkpoint_base,
        env.get("TMPDIR"),
        env.get("HF_HOME"),
        env.get("HF_HUB_CACHE"),
        env.get("HH_DATA"),
        config.cluster.cache,
    ]
    named.append(config.serving.baseline_cache)
    # A snapshot's files are links to those beside it.
    fetched = [Path(pin.folder).parents[1] for pin in pins(run).values()]
    return [run.root, _CODE, *fetched, *(Path(name) for name in named if name and os.path.isabs(name))]
