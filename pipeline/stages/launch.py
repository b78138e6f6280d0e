"""How training processes are started: one plain process, or `accelerate launch` with several."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from pipeline.errors import UserError, nearest
from pipeline.network import free_port
from pipeline.resources import resource_dir, resource_names
from pipeline.stages.base import Work, work_arguments


def launch_command(module: str, work: Work, processes: int, config_file: Path, precision: str = "no") -> list[str]:
    """`accelerate launch ... -m module --run RUN --out OUT`: this node's share of `processes`, which all nodes have.

    Each node runs a launcher of its own; DeepSpeed's, which would log in to the others, is not used.
    Everything that a config file could decide for another machine is given: counts, rank, port, precision.
    """
    nodes = work.nodes
    return [
        *(sys.executable, "-m", "pipeline.training.launch"),
        *("--config_file", str(config_file)),
        *("--num_processes", str(processes)),
        *("--num_machines", str(nodes.count), "--machine_rank", str(nodes.rank)),
        *("--main_process_ip", nodes.address, "--main_process_port", str(nodes.port or free_port())),
        *(("--deepspeed_multinode_launcher", "standard") if nodes.count > 1 else ()),
        *("--mixed_precision", precision),
        *("-m", module, *work_arguments(work)),
    ]


def plain_command(module: str, work: Work) -> list[str]:
    """The same work in one process, without a launcher."""
    return [sys.executable, "-m", module, *work_arguments(work)]


def accelerate_config(name: str, gpus: int) -> Path:
    """The accelerate config file called `name`, a path, or for "auto" the right one for the devices."""
    if name == "auto":
        name = "zero2-bf16" if gpus else "ddp-cpu"
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise UserError(f"train.accelerate_config: {name}: no such file")
        return path.resolve()
    names = resource_names("accelerate", ".yaml")
    if name not in names:
        raise UserError(
            f"train.accelerate_config: unknown name '{name}'{nearest(name, names)}; there are: {', '.join(names)}"
        )
    return resource_dir("accelerate") / f"{name}.yaml"


def precision_of(config_file: Path) -> str:
    """The arithmetic that an accelerate config file asks for: no, bf16 or fp16."""
    try:
        raw = yaml.safe_load(config_file.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{config_file}: cannot be read ({' '.join(str(error).split())}); restore it") from error
    found = raw.get("mixed_precision", "no") if isinstance(raw, dict) else None
    precision = "no" if found is False else str(found)  # YAML takes a bare no for false
    if precision not in {"no", "bf16", "fp16"}:
        raise UserError(f"{config_file}: mixed_precision: {found} is not supported; give 'no', bf16 or fp16")
    return precision


def thread_environment(work: Work, processes: int) -> dict[str, str]:
    """An equal share of the CPUs for each process, the same at every attempt, so that sums keep their order."""
    return {"OMP_NUM_THREADS": str(max(1, work.cpus * work.nodes.count // processes))}
