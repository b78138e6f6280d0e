"""The control plane starts fast and without torch; the data plane knows nothing of jobs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pipeline"
DATA_PLANE = ("training", "serving", "data", "evaluation")
HEAVY = ("torch", "transformers", "accelerate", "datasets", "numpy", "tritonclient", "wandb")


def imported(module: str) -> set[str]:
    script = f"import sys, {module}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        *("submit", "status", "logs", "cancel", "sync", "doctor", "serve", "score", "rm_eval", "convert"),
        *("sweep.submit", "sweep.results", "stages.job", "stages.plan", "dry_run", "site.examine"),
    ],
)
def test_the_control_plane_imports_no_torch(module: str) -> None:
    assert not imported(f"pipeline.{module}") & set(HEAVY)


def modules_named(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", [p for folder in DATA_PLANE for p in sorted((PACKAGE / folder).glob("*.py"))], ids=str)
def test_the_data_plane_imports_nothing_of_jobs(path: Path) -> None:
    forbidden = ("submitit", "pipeline.scheduler", "pipeline.stages", "pipeline.submit")
    assert not [name for name in modules_named(path) if name.startswith(forbidden)]


def test_one_module_touches_subprocess() -> None:
    users = [str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if "subprocess" in modules_named(p)]
    assert users == ["procs.py"]


def test_modules_stay_small() -> None:
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 320}
    assert not long
