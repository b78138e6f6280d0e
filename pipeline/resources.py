"""Finds the data that the package needs, from a checkout and from an installed wheel alike."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_INSIDE = {"presets": _PACKAGE / "config" / "presets", "accelerate": _PACKAGE / "config" / "accelerate"}


def resource_dir(name: str) -> Path:
    """Return the folder "presets", "accelerate", "slurm", "containers" or "model_store_templates".

    The last three stand at the top of a checkout; a wheel carries them as pipeline/_resources/<name>.
    """
    if name in _INSIDE:
        return _INSIDE[name]
    packaged = _PACKAGE / "_resources" / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name


def resource_names(name: str, suffix: str) -> list[str]:
    """The stems of the files with `suffix` in a resource folder, sorted."""
    return sorted(path.stem for path in resource_dir(name).glob(f"*{suffix}"))
