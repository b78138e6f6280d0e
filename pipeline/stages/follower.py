"""What runs on the further nodes of a job: their share of the training, and their reward server."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from dataclasses import asdict
from pathlib import Path

from pipeline import oom, procs
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.run.endpoint import WAIT_VARIABLE
from pipeline.run.sources import check_sources
from pipeline.stages import faults
from pipeline.stages.base import Work
from pipeline.stages.execute import FINGERPRINT, STOPPED, StageFailed, failure_reason, log_tail, run_child, started_as
from pipeline.stages.nodes import Meeting, Nodes, Rendezvous
from pipeline.stages.registry import REGISTRY
from pipeline.stages.service import share_devices, supervised

log = logging.getLogger("pipeline")


def follow_leader(run: RunDir, config: Config, names: tuple[str, ...], nodes: Nodes) -> None:
    """Do this node's part of the job until the leader's work is over."""
    if not {"serve", "train"} & set(names):
        return  # the work of other stages fits one node
    meeting, since = Meeting(run), time.time()
    while (rendezvous := meeting.called()) is None:
        if _over(meeting, since):
            return
        meeting.beat(nodes.rank)
        time.sleep(0.2)
    kills = oom.kills()
    try:
        with contextlib.ExitStack() as stack:
            train_devices, server_devices = share_devices(config, names)
            server = None
            if "serve" in names:
                beat = functools.partial(meeting.beat, nodes.rank)
                server = stack.enter_context(supervised(run, config, server_devices, index=nodes.rank, tick=beat))

            def tick() -> None:
                meeting.beat(nodes.rank)
                if server is not None:
                    server.tick()
                if _over(meeting, since):
                    raise _LeaderGone

            if "train" in names:
                _train(run, config, rendezvous, nodes, train_devices, meeting, tick)
            while True:
                tick()
                time.sleep(0.2)
    except _LeaderGone:
        return
    except (UserError, StageFailed) as error:
        fault = error.fault if isinstance(error, StageFailed) else faults.of_work(None, str(error), "", kills)
        meeting.beat(nodes.rank, reason=str(error), fault=asdict(fault) if fault else None)
        raise


class _LeaderGone(Exception):
    """The leader's work is over."""


def _over(meeting: Meeting, since: float) -> bool:
    word = meeting.word(0) or {}
    return "status" in word or meeting.lost(0, since)


def _train(
    run: RunDir,
    config: Config,
    rendezvous: Rendezvous,
    nodes: Nodes,
    devices: tuple[str, ...],
    meeting: Meeting,
    tick: procs.Tick,
) -> None:
    """Start this node's processes of the training and report how they ended."""
    if len(devices) != rendezvous.devices:
        raise UserError(
            f"cluster.stages.train: {os.uname().nodename} has {len(devices)} GPUs to train on, the first node "
            f"{rendezvous.devices}; ask for nodes that are alike"
        )
    check_sources(run, config, "train")  # this node may not see what the first one does
    here = Nodes(nodes.count, nodes.rank, rendezvous.address, rendezvous.port)
    folder = run.attempt(rendezvous.stage, rendezvous.attempt)
    work = Work(run, config, folder / "out", devices, nodes=here)
    stage = REGISTRY[rendezvous.stage]
    more = {FINGERPRINT: rendezvous.fingerprint, WAIT_VARIABLE: str(config.serving.start_timeout_s)}
    log_path = Path(folder / f"stdout-{nodes.rank}.log")
    kills = oom.kills()
    status = run_child(run.root, *started_as(stage, work, more), log_path, tick)
    if status not in (0, STOPPED):
        told = failure_reason(status, log_path)
        fault = faults.of_work(status, told, "\n".join(log_tail(log_path)), kills)
        raise StageFailed(told, rendezvous.attempt, fault)
    meeting.beat(nodes.rank, status=status)
