"""serve: the reward server beside a training, or on its own."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run import endpoint
from pipeline.run.directory import RunDir
from pipeline.scheduler.state import set_state
from pipeline.stages.base import Context
from pipeline.stages.devices import split_devices, visible_devices
from pipeline.stages.execute import run_stage

if TYPE_CHECKING:
    from pipeline.serving.supervisor import Supervisor


def serve_train(context: Context, submission: str, reason: str, forced: bool) -> None:
    """Run the server and the training side by side; the server ends with the training that it serves.

    Both start at once: the training waits for the published endpoint, while it loads its own models.
    """
    run, serving = context.run, context.config.serving
    train_devices, server_devices = split_devices(visible_devices())
    set_state(run, "serve", submission, "running", "starting tritonserver")
    endpoint.withdraw(run)  # of an attempt that was killed: the training must not take it for this one's
    announced = False

    def tick() -> None:
        nonlocal announced
        server.tick()
        if server.up and not announced:
            announced = True
            set_state(run, "serve", submission, "running", f"TRITON_HOST={server.triton_host}")

    try:
        with _supervised(run, context.config, server_devices, wait=False) as server:
            environment = {endpoint.WAIT_VARIABLE: str(serving.start_timeout_s)}
            run_stage(context, "train", submission, reason, train_devices, environment, tick, forced)
    except BaseException as error:
        # A training that failed is no fault of the server's: only its own errors reach us as UserErrors.
        set_state(run, "serve", submission, "failed" if isinstance(error, UserError) else "stopped", str(error))
        raise
    set_state(run, "serve", submission, "done", "ended with the training that it served")


def serve_alone(run: RunDir, config: Config, submission: str) -> None:
    """Serve until the job is asked to end."""
    _, server_devices = split_devices(visible_devices())
    set_state(run, "serve", submission, "running", "starting tritonserver")
    with _supervised(run, config, server_devices) as server:
        set_state(run, "serve", submission, "running", f"TRITON_HOST={server.triton_host}")
        while True:
            server.tick()
            time.sleep(0.2)


def _supervised(
    run: RunDir, config: Config, devices: tuple[str, ...], wait: bool = True
) -> AbstractContextManager[Supervisor]:
    from pipeline.serving.sandbox import open_sandbox
    from pipeline.serving.supervisor import supervise  # brings gRPC: not needed while a job waits

    if run.outputs("sandbox") is None:
        raise UserError(f"{run.root}: stage sandbox is not done; run it first with --stage sandbox")
    folder = run.stage("serve")
    folder.mkdir(parents=True, exist_ok=True)
    job_id = os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID") or str(os.getpid())
    engine = open_sandbox(run.values("sandbox"))
    return supervise(run, config, engine, devices, folder / "tritonserver.log", job_id, wait=wait)
