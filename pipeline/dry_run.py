"""--dry-run: the plan, each job with its whole sbatch script, and every command line. Writes nothing."""

from __future__ import annotations

import os
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.containers.command import choose_engine
from pipeline.containers.trainer import in_image
from pipeline.run import snapshot
from pipeline.run.directory import RunDir
from pipeline.scheduler import script
from pipeline.scheduler.submit import divide, group_jobs
from pipeline.stages.base import Work
from pipeline.stages.devices import split_devices, visible_devices
from pipeline.stages.nodes import ONE_NODE, Nodes
from pipeline.stages.plan import Planned
from pipeline.stages.registry import REGISTRY


def show_plan(run: RunDir, config: Config, plan: Sequence[Planned]) -> None:
    """Print everything that `submit` would do."""
    print(f"plan for {run.root} (preset {config.preset}, cluster {config.cluster.name}):")
    for each in plan:
        print(f"  {each.stage:<13}{each.action:<7}{each.reason}")
    here, rest = divide(config, plan)
    for job in group_jobs(config, here):
        print(f"\njob {job.name} (here, before anything is submitted)")
        for stage in job.stages:
            print("  " + render_command(run, config, stage))
    code = snapshot.folder(run)
    for job in group_jobs(config, rest):
        waits = f", after {', '.join(job.waits_for)}" if job.waits_for else ""
        beside = f", beside {', '.join(job.beside)}" if job.beside else ""
        print(f"\njob {job.name} ({config.cluster.executor}{waits}{beside})")
        if config.cluster.executor == "slurm":
            print(textwrap.indent(script.render(run, "<submission>", config.cluster, job, code), "    "))
        for stage in job.stages:
            print("  " + render_command(run, config, stage))


def render_command(run: RunDir, config: Config, stage: str) -> str:
    """A stage's command line as a shell would take it, with its own environment in front."""
    if stage == "serve":
        return render_server(run, config)
    devices = _shares(config)[0] if stage == "train" else _devices(config, stage)
    asked, here = config.cluster.resources(stage), config.cluster.executor != "slurm"
    cpus = len(os.sched_getaffinity(0)) if here else asked.cpus
    nodes = Nodes(asked.nodes, 0, "<first-node>", 29500) if asked.nodes > 1 and not here else ONE_NODE
    work = Work(run, config, run.attempt(stage, 0) / "out", devices, cpus, nodes)
    definition = REGISTRY[stage]
    own = definition.environment(work)
    argv = definition.command(work)
    if definition.contained:
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(work.devices)} if work.devices else {}
        argv, _ = in_image(argv, {**own, **visible}, run, config)
    environment = " ".join(f"{key}={shlex.quote(value)}" for key, value in own.items())
    return (environment + " " if environment else "") + shlex.join(argv)


def render_server(run: RunDir, config: Config) -> str:
    """tritonserver's command line; what is only known when it starts stands in angle brackets."""
    from pipeline.serving import engines
    from pipeline.stages.service import with_bind

    made = run.values("sandbox")
    path = made.get("path", "<sandbox>")
    name = made.get("engine") or choose_engine(config.sandbox.engine, config.cluster.engine)
    wanted = "<packages>" if config.sandbox.packages == "trainer" else None
    packages = Path(site) if (site := made.get("packages", wanted)) else None
    engine: engines.Engine
    if name == "venv":
        engine = engines.Venv(Path(path), ())
    elif name == "docker":
        engine = engines.Docker(path if made else config.sandbox.image, packages=packages)
    else:
        engine = engines.Apptainer(path, name=name, packages=packages)
    _, devices = _shares(config)
    bind = with_bind(config).serving.bind
    address = {"unix": "unix:<socket folder>/rm.sock", "loopback": "127.0.0.1"}.get(bind, "<this node's address>")
    certificates = None if bind == "unix" else run.endpoint.parent / "tls"
    port = config.serving.grpc_port or 8001
    spec = engines.ServerSpec(run.root / "model_store", address, port, devices, tls=certificates)
    return f"CUDA_VISIBLE_DEVICES={','.join(devices)} {shlex.join(engine.server_argv(spec))}"


def _shares(config: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(training's, server's) GPUs: those of one job, or of two."""
    if config.cluster.placement == "separate":
        return _devices(config, "train"), _devices(config, "serve")[-1:]
    return split_devices(_devices(config, "train"))


def _devices(config: Config, stage: str) -> tuple[str, ...]:
    """This machine's GPUs for local jobs; for Slurm as many as the profile asks for, numbered from 0."""
    if config.cluster.executor == "slurm":
        return tuple(str(index) for index in range(config.cluster.resources(stage).gpus))
    return visible_devices()
