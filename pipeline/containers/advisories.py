"""Known holes of Triton: what NVIDIA has published of it, and the release that first has each fix.

From NVIDIA's product security bulletins (github.com/NVIDIA/product-security), as of November 2026. Bulletins of the
releases before 25.07 are left out: who runs one of those lacks all that follow.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Release = tuple[int, int]


@dataclass(frozen=True)
class Bulletin:
    """A bulletin, and the first release with all of its fixes."""

    fixed: Release
    number: int
    holes: str = ""
    """The gravest, in a few words."""


BULLETINS = (
    Bulletin((25, 7), 5687, "CVE-2025-23310, -23311, -23317 (HTTP), -23319, -23320, -23334: foreign code can run"),
    Bulletin((25, 8), 5691, "CVE-2025-23316 (model control): foreign code can run; CVE-2025-23329"),
    Bulletin((25, 9), 5723),
    Bulletin((25, 10), 5734),
    Bulletin((26, 1), 5790),
    Bulletin((26, 2), 5816),
    Bulletin((26, 3), 5828, "CVE-2026-24206, -24207: authentication can be passed by"),
    Bulletin((26, 4), 5848),
    Bulletin((26, 5), 5853),
    Bulletin((26, 6), 5865, "CVE-2026-47627 (severity 9.8)"),
    Bulletin((26, 7), 5875),
)
FIXED = BULLETINS[-1].fixed
"""The first release without known holes."""


def missing_fixes(release: Release | None) -> tuple[Bulletin, ...]:
    """The bulletins whose fixes a release lacks; none for one that is not known."""
    return tuple(bulletin for bulletin in BULLETINS if release is not None and release < bulletin.fixed)


def warning(release: Release | None) -> str | None:
    """One line about a release's holes; None where none are known, or the release is not."""
    missing = missing_fixes(release)
    if release is None or not missing:
        return None
    return (
        f"Triton {text(release)} has known holes ({len(missing)} of NVIDIA's security bulletins, fixed by "
        f"{text(FIXED)}): see docs/reward-serving.md, Known holes"
    )


def release_of(version: str) -> Release | None:
    """A tritonserver's release: (24, 10) of "2.51.0"; None when the text is no version.

    Minor versions count months, but for release 25.07, which was 2.59.1.
    """
    match = re.fullmatch(r"2\.(\d+)\.(\d+)\S*", version)
    if match is None:
        return None
    minor, patch = int(match[1]), int(match[2])
    later = minor >= 60 or (minor == 59 and patch > 0)
    months = 22 * 12 + 7 + minor - 25 + later  # 2.25.0 was 22.08
    return months // 12, months % 12 + 1


def text(release: Release) -> str:
    """A release as NVIDIA writes it: 24.10."""
    return f"{release[0]}.{release[1]:02d}"
