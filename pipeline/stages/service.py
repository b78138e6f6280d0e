"""serve: the reward server beside a training, in a job of its own, or for as long as one likes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.procs import Tick
from pipeline.run import endpoint
from pipeline.run.directory import RunDir
from pipeline.scheduler import slurm
from pipeline.scheduler.state import set_state
from pipeline.scheduler.submission import Submission
from pipeline.stages.base import Context
from pipeline.stages.devices import granted_devices, split_devices
from pipeline.stages.execute import StageFailed, Superseded, run_stage
from pipeline.stages.nodes import Leader, Nodes, Rendezvous
from pipeline.stages.partner import LOOK_S, Partner
from pipeline.stages.surroundings import OFFLINE

if TYPE_CHECKING:
    from pipeline.serving.service import Service


def share_devices(config: Config, names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(training's, server's) of the GPUs of a job with these stages: only where both are in it they share them."""
    devices = granted_devices(config.cluster, names)
    if names == ("serve", "train"):
        return split_devices(devices)
    return devices, devices[-1:]


def serve_train(context: Context, submission: str, reason: str, forced: bool, nodes: Nodes) -> None:
    """Run the server and the training side by side; the server ends with the training that it serves.

    Both start at once: the training waits for the published endpoint, while it loads its own models.
    """
    run, serving = context.run, context.config.serving
    set_state(run, "serve", submission, "running", "starting tritonserver")
    endpoint.withdraw(run)  # of an attempt that was killed: the training must not take it for this one's
    announced = ""

    def tick() -> None:
        nonlocal announced
        server.tick()
        if server.up and announced != server.triton_host:
            announced = server.triton_host
            set_state(run, "serve", submission, "running", f"TRITON_HOST={server.triton_host}")

    try:
        train_devices, server_devices = share_devices(context.config, ("serve", "train"))
        with supervised(run, context.config, server_devices, tick=Leader(run, nodes.count).beat) as server:
            environment = {endpoint.WAIT_VARIABLE: str(serving.start_timeout_s)}
            run_stage(context, "train", submission, reason, train_devices, environment, tick, forced, nodes)
    except Superseded:
        raise  # the states are the later attempt's
    except BaseException as error:
        # A training that failed is no fault of the server's: only its own errors reach us as UserErrors.
        set_state(run, "serve", submission, "failed" if isinstance(error, UserError) else "stopped", str(error))
        raise
    endpoint.withdraw(run)  # of a further node whose task was killed: an evaluation must not wait for that server
    set_state(run, "serve", submission, "done", "ended with the training that it served")


def train_beside_server(context: Context, submission: Submission, reason: str, forced: bool, nodes: Nodes) -> None:
    """Run the training, whose server is a job of its own: while that job waits or runs, its server is waited for."""
    run = context.run
    server, said = Partner(run, submission, "train", "serve"), float("-inf")

    def tick() -> None:
        nonlocal said
        ended = server.ended()
        if ended is not None:
            raise StageFailed(f"its reward server is gone: {ended}", 0)
        if time.monotonic() - said > LOOK_S:
            said = time.monotonic()
            endpoint.expect(run)

    tick()
    environment = {endpoint.WAIT_VARIABLE: str(context.config.serving.start_timeout_s)}
    devices = granted_devices(context.config.cluster, ("train",))
    run_stage(context, "train", submission.id, reason, devices, environment, tick, forced, nodes)


def serve_alone(run: RunDir, config: Config, submission: Submission, nodes: Nodes) -> None:
    """Serve until the job is asked to end, or until the training of the same submission is over."""
    training = Partner(run, submission, "serve", "train")

    def over() -> bool:
        return training.exists and training.ended() is not None

    if over():
        set_state(run, "serve", submission.id, "skipped", "not needed: the training is over")
        return
    set_state(run, "serve", submission.id, "running", "starting tritonserver")
    devices, leader = share_devices(config, ("serve",))[1], Leader(run, nodes.count)
    announced = missing = ""
    with leader.calling(Rendezvous("serve")), supervised(run, config, devices, tick=leader.beat) as server:
        while not over():
            leader.beat()  # a model may take longer to load than other nodes wait for a word
            server.tick()
            before = announced, missing
            if server.up:
                announced = f"TRITON_HOST={server.triton_host}"  # which a change of model moves
            if not missing and (lost := leader.lost()) is not None:
                missing = f"; goes on without {lost}"
            if (announced, missing) != before:
                set_state(run, "serve", submission.id, "running", (announced or "starting tritonserver") + missing)
            time.sleep(0.2)
    endpoint.withdraw(run)  # as above
    said = "no training came for it" if training.missed else "ended with the training that it served"
    set_state(run, "serve", submission.id, "done", said)


@contextlib.contextmanager
def supervised(
    run: RunDir, config: Config, devices: tuple[str, ...], *, index: int = 0, tick: Tick = lambda: None
) -> Iterator[Service]:
    """The run's reward server while the block runs, which ticks it; it is not waited for.

    `index` tells the servers of several nodes apart; `tick` is called while an image is unpacked, which takes minutes.
    """
    from pipeline.serving.sandbox import open_sandbox
    from pipeline.serving.service import supervise  # brings gRPC: not needed while a job waits

    if run.outputs("sandbox") is None:
        raise UserError(f"{run.root}: stage sandbox is not done; run it first with --stage sandbox")
    folder = run.stage("serve")
    folder.mkdir(parents=True, exist_ok=True)
    ids = (slurm.job_id(), *(os.environ.get(name) for name in ("SLURM_JOB_ID", "SUBMITIT_LOCAL_JOB_ID")))
    job_id = next(filter(None, ids), str(os.getpid()))
    os.environ |= OFFLINE  # this process and the server: neither has anything to ask the hub
    log_path = folder / ("tritonserver.log" if index == 0 else f"tritonserver-{index}.log")
    with open_sandbox(run.values("sandbox"), log_path, tick) as engine:
        serving = supervise(run, with_bind(config), engine, devices, log_path, job_id, wait=False, index=index)
        with serving as supervisor:
            yield supervisor


def with_bind(config: Config) -> Config:
    """The configuration with `serving.bind: auto` decided: only a server in a job of its own is on the network."""
    if config.serving.bind != "auto":
        return config
    separate = config.cluster.executor == "slurm" and config.cluster.placement == "separate"
    serving = config.serving.model_copy(update={"bind": "network" if separate else "unix"})
    return config.model_copy(update={"serving": serving})
