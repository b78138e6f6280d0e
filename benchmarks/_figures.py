"""How the benchmarks measure and show: alternating rounds, wall seconds, what a device can do, and tables."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def alternate(sides: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[Any]]:
    """What each side returned, round by round; the first `warm_up` rounds are left out."""
    results: dict[str, list[Any]] = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        for name, side in sides.items():
            result = side()
            if number >= warm_up:
                results[name].append(result)
    return results


def seconds(work: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """Wall seconds of `work`, with all that it started on a GPU."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: str | torch.device) -> None:
    """Wait for a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def matmul_flops(device: str | torch.device, dtype: torch.dtype, times: int = 12) -> float:
    """Operations a second of the best of several large matrix products."""
    size = 8192 if torch.device(device).type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(times))


def copy_bandwidth(device: str | torch.device, times: int = 12) -> float:
    """Bytes a second that the best of several large copies reads and writes."""
    size = 2**30 if torch.device(device).type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(seconds(lambda: target.copy_(source), device) for _ in range(times))


def machine(device: str | torch.device = "cpu") -> str:
    """The hardware in a few words, and how busy it is with other work."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    busy = f"; load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return f"{os.cpu_count()} CPUs, {torch.get_num_threads()} thread(s), torch {torch.__version__}{busy}"


Figure = tuple[str, Sequence[float], str]
"""A name, a value a round, and the aim."""


def print_figures(figures: Sequence[Figure]) -> None:
    """Median and range of each figure beside its aim."""
    print(f"\n{'figure':<44}{'median':>11}{'min':>11}{'max':>11}   aim")
    for name, values, aim in figures:
        print(f"{name:<44}{statistics.median(values):>11.3f}{min(values):>11.3f}{max(values):>11.3f}   {aim}".rstrip())


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need to be; the first is to the left."""
    widths = [max(len(row[place]) for row in (titles, *rows)) for place in range(len(titles))]
    print()
    for row in (titles, *rows):
        cells = [cell.ljust(width) if not place else cell.rjust(width + 2)
                 for place, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        print("".join(cells).rstrip())


def write_json(path: Path | None, report: Mapping[str, Any]) -> None:
    """Write a report where one was asked for."""
    if path is not None:
        path.write_text(json.dumps(report, indent=1, default=float) + "\n", "utf-8")
