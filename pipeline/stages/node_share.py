"""What runs on a further node of a job: its share of the training, and its own reward server."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import oom, procs
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.run.endpoint import WAIT_VARIABLE
from pipeline.run.sources import check_sources
from pipeline.stages import faults
from pipeline.stages.base import Work
from pipeline.stages.execute import FINGERPRINT, STOPPED, StageFailed, failure_reason, log_tail, run_child, started_as
from pipeline.stages.nodes import CALL_S, SPREAD, Meeting, Nodes, Rendezvous
from pipeline.stages.registry import REGISTRY
from pipeline.stages.service import share_devices, supervised

if TYPE_CHECKING:
    from pipeline.serving.service import Service

log = logging.getLogger("pipeline")


def do_share(run: RunDir, config: Config, names: tuple[str, ...], nodes: Nodes) -> None:
    """Do this node's part of the job until the leader's work is over.

    A failure is told to the leader and is its to judge: this task ends well, since srun ends as its worst task does.
    """
    if not SPREAD.intersection(names):
        return
    meeting, kills = Meeting(run), oom.kills()
    try:
        _follow(run, config, names, nodes, meeting)
    except _LeaderGone:
        log.info("the first node's work is over, or that node is lost")
    except StageFailed as error:
        _tell(meeting, nodes, str(error), error.fault)
    except UserError as error:
        _tell(meeting, nodes, str(error), faults.of_work(None, str(error), "", kills))
    except Exception as error:  # a bug: its traceback is in this task's log
        log.exception("this node's share of the work failed")
        reason = f"{type(error).__name__}: {error}"
        _tell(meeting, nodes, reason, faults.of_work(None, reason, "", kills))


def _tell(meeting: Meeting, nodes: Nodes, reason: str, fault: faults.Fault | None) -> None:
    log.warning("told the first node: %s", reason)
    meeting.beat(nodes.rank, reason=reason, fault=asdict(fault) if fault else None)


class _LeaderGone(Exception):
    """The leader's work is over, or the leader is lost."""


def _follow(run: RunDir, config: Config, names: tuple[str, ...], nodes: Nodes, meeting: Meeting) -> None:
    """Work until the leader's work is over: that, or a failure here, ends it."""
    while (rendezvous := meeting.called()) is None:
        meeting.beat(nodes.rank)
        if meeting.over(CALL_S):
            raise _LeaderGone
        time.sleep(0.2)
    server: Service | None = None

    def tick() -> None:
        meeting.beat(nodes.rank)
        if server is not None:
            server.tick()
        if meeting.over():
            raise _LeaderGone

    with contextlib.ExitStack() as stack:
        train_devices, server_devices = share_devices(config, names)
        if "serve" in names:
            beat = functools.partial(meeting.beat, nodes.rank)
            server = stack.enter_context(supervised(run, config, server_devices, index=nodes.rank, tick=beat))
        if "train" in names:
            status = _train(run, config, rendezvous, nodes, train_devices, tick)
            meeting.beat(nodes.rank, status=status)
        while True:
            tick()
            time.sleep(0.2)


def _train(
    run: RunDir, config: Config, rendezvous: Rendezvous, nodes: Nodes, devices: tuple[str, ...], tick: procs.Tick
) -> int:
    """Run this node's processes of the training; returns their status when they ended well, or stopped as asked."""
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
    return status
