"""How often the kernel has killed a process of this control group for want of memory (cgroup v1 and v2).

Slurm says so only when a job is over, and not on every site; the kernel counts it at once.
"""

from __future__ import annotations

import re
from pathlib import Path


def kills(proc: Path = Path("/proc/self")) -> int | None:
    """Processes of this one's group killed so far; None where the kernel does not show it."""
    try:
        file = _counter((proc / "cgroup").read_text(), (proc / "mountinfo").read_text())
        counted = re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE) if file else None
    except OSError:
        return None
    return int(counted[1]) if counted else None


def _counter(groups: str, mounts: str) -> Path | None:
    """The file with the counter. Where both hierarchies are mounted, v1 is the one that limits memory, if it has it."""
    paths = {}
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))  # the unified hierarchy names none: ""
    for controller, kind, name in (("memory", "cgroup", "memory.oom_control"), ("", "cgroup2", "memory.events")):
        if controller in paths:
            for line in mounts.splitlines():
                place, _, system = line.partition(" - ")
                root, mounted = place.split()[3:5]
                kind_here, _, options = system.split(" ", 2)
                fits = kind_here == kind and (not controller or controller in options.split(","))
                group = Path(paths[controller])
                if fits and group.is_relative_to(root):
                    return Path(mounted) / group.relative_to(root) / name
    return None
