"""Which driver and which GPUs a Triton image needs.

From the release notes of the Triton Inference Server container (docs.nvidia.com/deeplearning/triton-inference-server/
release-notes): each names its CUDA, the driver that this needs, the older branches that data centre GPUs may use
instead (through the compatibility libraries in the image), and the compute capabilities. CUDA 13 itself needs R580;
of the older branches the notes then list, only those are kept that CUDA's compatibility documentation lists too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Version = tuple[int, ...]


@dataclass(frozen=True)
class Needs:
    """What an image of a release, or of a later one up to the next row, asks of the machine."""

    release: Version
    cuda: str
    driver: Version
    branches: tuple[Version, ...]
    """The first versions of older driver branches that do for data centre GPUs."""
    oldest: Version
    """Compute capability from which on GPUs are supported."""
    newest: Version
    """And up to which."""


_OLD = ((450, 51), (470, 57), (510, 47))
TABLE = (
    Needs((22, 5), "11.7", (515,), _OLD, (6, 0), (8, 7)),
    Needs((22, 9), "11.8", (520,), (*_OLD, (515, 65)), (6, 0), (9, 0)),
    Needs((23, 1), "12.0", (525,), (*_OLD, (515, 65)), (6, 0), (9, 0)),
    Needs((23, 4), "12.1", (530,), (*_OLD, (515, 65), (525, 85)), (6, 0), (9, 0)),
    Needs((23, 8), "12.2", (535,), (*_OLD, (525, 85)), (6, 0), (9, 0)),
    Needs((23, 12), "12.3", (545,), (*_OLD, (525, 85), (535, 86)), (6, 0), (9, 0)),
    Needs((24, 3), "12.4", (545,), ((470, 57), (525, 85), (535, 86)), (6, 0), (9, 0)),
    Needs((25, 2), "12.8", (560,), ((470, 57), (525, 85), (535, 86), (545, 23)), (7, 5), (12, 0)),
    Needs((25, 8), "13.0", (580,), ((535, 86), (550, 54), (570, 86)), (7, 5), (12, 1)),
)

_TYPES = {
    "p100": (6, 0), "v100": (7, 0), "t4": (7, 5), "a100": (8, 0), "a30": (8, 0), "a40": (8, 6), "a10": (8, 6),
    "a6000": (8, 6), "l4": (8, 9), "l40": (8, 9), "l40s": (8, 9), "h100": (9, 0), "h200": (9, 0), "h800": (9, 0),
    "gh200": (9, 0), "b200": (10, 0), "gb200": (10, 0), "b300": (10, 3), "gb300": (10, 3),
}  # fmt: skip
"""Compute capability of the GPUs that sites name in their Gres."""
_NOT_DATA_CENTRE = re.compile(r"geforce|titan|quadro|rtx (?!pro)|nvs", re.IGNORECASE)


def release_of(image: str) -> tuple[int, int] | None:
    """(22, 8) of ".../tritonserver:22.08-py3"; None where the image is no release of NVIDIA's."""
    match = re.search(r"tritonserver:(\d\d)\.(\d\d)", image)
    return (int(match[1]), int(match[2])) if match else None


def needs_of(release: Version) -> Needs | None:
    """What images of the release need; None for those before the table."""
    return next((row for row in reversed(TABLE) if row.release <= release), None)


def capability_of_type(gpu_type: str) -> Version | None:
    """Compute capability of a GPU type in Slurm's words ("a100", "nvidia_h100_80gb_hbm3"); None when it says none."""
    words = re.split(r"[^a-z0-9]+", gpu_type.lower())
    return next((_TYPES[word] for word in words if word in _TYPES), None)


def driver_fits(driver: Version, gpu: str, needs: Needs) -> bool:
    """Whether the driver is new enough, or one of the older branches and the GPU one of a data centre."""
    if driver >= needs.driver:
        return True
    data_centre = not _NOT_DATA_CENTRE.search(gpu)
    return data_centre and any(branch[0] == driver[0] and driver >= branch for branch in needs.branches)
