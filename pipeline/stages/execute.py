"""One attempt at a stage: a numbered folder, a child process, its log, and outputs.json last."""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from pipeline import network, oom, procs
from pipeline.containers.trainer import check_image, image_digest, in_image
from pipeline.errors import UserError
from pipeline.run import atomic, hashing, work
from pipeline.run.directory import Artifact, Outputs, RunDir
from pipeline.run.progress import SUPERVISED, folder_name, stage_of
from pipeline.scheduler import slurm
from pipeline.scheduler.state import set_state
from pipeline.stages import faults
from pipeline.stages.base import Context, Stage, Work
from pipeline.stages.nodes import ONE_NODE, Leader, Lost, Nodes, Rendezvous
from pipeline.stages.plan import basis
from pipeline.stages.registry import REGISTRY
from pipeline.stages.surroundings import surroundings

log = logging.getLogger("pipeline")

FINGERPRINT = "HH_PIPELINE_FINGERPRINT"
"""Environment variable that names the folder of the training's checkpoints: its fingerprint, as a rule."""
STOPPED = 75
"""Exit status (EX_TEMPFAIL) of a work that was asked to stop and saved its state."""

_LINKS = {"model_store": "model_store", "policy": "models/policy", "report": "report", "data": "data"}
"""Links at the top of the run directory to the artifacts of the latest attempts."""


class StageFailed(Exception):
    """A stage's work did not end well; the message says why in one line."""

    def __init__(self, reason: str, attempt: int, fault: faults.Fault | None = None) -> None:
        super().__init__(reason)
        self.attempt = attempt
        self.fault = fault
        """What a retry may cure; None for a failure of the work's own."""


class StageStopped(Exception):
    """A stage saved its state and stopped because it was asked to."""

    def __init__(self, reason: str, attempt: int) -> None:
        super().__init__(reason)
        self.attempt = attempt


class Superseded(BaseException):
    """Another job has begun a later attempt at the stage: this one's job was given up for lost, and must touch nothing.

    Slurm starts a job anew elsewhere when it loses sight of a node, whether or not that node still works.
    """


def run_stage(
    context: Context,
    stage_name: str,
    submission: str,
    reason: str,
    devices: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    tick: procs.Tick = lambda: None,
    forced: bool = False,
    nodes: Nodes = ONE_NODE,
) -> Outputs:
    """Run a stage's work to its end and record its outputs. `tick` is called a few times a second meanwhile.

    With several nodes this is the first of them; it lets the others begin, and fails when one of them does. A forced
    attempt begins from nothing: it does not go on from the checkpoints of an earlier submission.

    Raises StageFailed, StageStopped or Superseded. Whatever ends this function early ends the child's whole tree too.
    """
    run, stage = context.run, REGISTRY[stage_name]
    image = image_digest(context.config, context.hashes) if stage.contained else None
    check_image(run, context.config, image)
    known = basis(stage, context)
    context.hashes.save()
    fingerprint = hashing.fingerprint(known)
    atomic.write_json(run.stage(stage_name) / "plan.json", {"fingerprint": fingerprint, "reason": reason, **known})
    number = next_attempt(run, stage_name)
    folder = run.attempt(stage_name, number)
    if nodes.count > 1:
        address = network.node_address(context.config.cluster.interface)
        nodes = Nodes(nodes.count, 0, address, network.free_port(address))
    job = Work(run, context.config, folder / "out", devices, nodes=nodes)
    job.out.mkdir(parents=True)
    log_path = folder / "stdout.log"
    training = folder_name(stage_name, f"{fingerprint}{'-' + submission if forced else ''}")
    environment = {FINGERPRINT: training, **(environment or {})}
    if forced:
        environment[work.FORCED] = "1"
    argv, env = started_as(stage, job, environment)
    atomic.write_json(folder / "job.json", {"argv": argv, "process": asdict(procs.this_process()), **_job_ids()})
    set_state(run, stage_name, submission, "running", reason, number)
    check = _place_check(run, stage_name, number)
    leader = Leader(run, nodes.count)

    def look() -> None:
        check()
        tick()
        leader.look()

    started, kills = time.time(), oom.kills()
    call = Rendezvous(stage_name, number, environment[FINGERPRINT], nodes.address, nodes.port, len(devices))
    try:
        with leader.calling(call):
            status = run_child(run.root, argv, env, log_path, look)
            failure = None if status in (0, STOPPED) else _failure(status, number, log_path, kills, leader)
    except Lost as lost:
        raise StageFailed(str(lost), number, lost.cause) from lost
    seconds = round(time.time() - started, 3)
    atomic.write_json(folder / "exit.json", {"status": status, "seconds": seconds})
    check()
    if status == STOPPED:
        raise StageStopped("it saved its state and stopped as asked; submit again to go on", number)
    if failure is not None:
        raise failure
    outputs = _record(
        run, stage, known, fingerprint, number, seconds, submission, {"trainer_image": image} if image else {}
    )
    set_state(run, stage_name, submission, "done", stage.headline(outputs.values), number)
    prune(run, stage_name, number)
    _prune_checkpoints(run, stage_name, training)
    return outputs


def _place_check(run: RunDir, stage: str, number: int) -> procs.Tick:
    """A function that raises Superseded once there is a later attempt."""
    later = run.attempt(stage, number + 1)

    def check() -> None:
        if later.exists():
            raise Superseded(f"{stage}: another job has begun attempt {number + 1}; attempt {number} ends")

    return check


def failure_reason(status: int, log_path: Path) -> str:
    """The most telling line of a failed work's log, with its exit status where there is none."""
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    if not log_path.exists():
        return how
    lines = log_tail(log_path)
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    exceptions = [line for line in lines if re.match(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt)\b", line)]
    # The launcher raises after its workers: the first exception is the cause.
    return f"{exceptions[0]} ({how}; log: {log_path})" if exceptions else f"{how}; log: {log_path}"


def log_tail(path: Path, size: int = 65536) -> list[str]:
    """The last lines of a log, without the ranks' marks; none where there is no log."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return [re.sub(r"^\[rank\d+\]:\s*", "", line) for line in lines]


def _failure(status: int, number: int, log_path: Path, kills: int | None, leader: Leader) -> StageFailed:
    """Why the work failed: by itself, or because of what happened on a further node."""
    told, tail = failure_reason(status, log_path), log_tail(log_path)
    fault = faults.of_work(status, told, "\n".join(tail), kills)
    certain = fault is not None or f"error: {told}" in tail  # its own word for what is wrong
    lost = leader.hear() if not certain else None
    return StageFailed(str(lost), number, lost.cause) if lost is not None else StageFailed(told, number, fault)


def run_child(run: Path, argv: list[str], env: dict[str, str], log_path: Path, tick: procs.Tick) -> int:
    """Run a work's command to its end, its output appended to `log_path`; returns its exit status.

    Whatever ends this function early, `tick` included, ends the child's whole tree too.
    """
    with log_path.open("ab") as output:
        child = procs.spawn(argv, env=env, output=output)
    try:
        while child.poll() is None:
            tick()
            time.sleep(0.1)
        return child.returncode
    finally:
        procs.end_tree(child, grace_s=40.0)
        # A launcher's processes have sessions of their own; killed early, it leaves them without a parent.
        procs.end_marked(run, (procs.ATTEMPT_MARK, env[procs.ATTEMPT_MARK]), grace_s=0.0)


def started_as(stage: Stage, job: Work, more: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """The command line and whole environment of a stage's work, in the trainer's image where there is one."""
    argv, env = stage.command(job), environment_of(stage, job, more)
    return in_image(argv, env, job.run, job.config) if stage.contained else (argv, env)


def environment_of(stage: Stage, job: Work, more: dict[str, str]) -> dict[str, str]:
    """The whole environment of a stage's work."""
    # Each node ends what is left of its own share only; in tests, and on some sites, nodes are one machine.
    share = f"#{job.nodes.rank}" if job.nodes.rank else ""
    env = {**os.environ, procs.ATTEMPT_MARK: f"{job.out.parent}{share}"}
    env |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "TOKENIZERS_PARALLELISM": "false"}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if job.devices:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(job.devices)
    env |= surroundings(job.config.cluster, stage.offline, os.environ)
    return {**env, **stage.environment(job), **more}


def _record(
    run: RunDir,
    stage: Stage,
    known: dict[str, object],
    fingerprint: str,
    number: int,
    seconds: float,
    submission: str,
    made_in: dict[str, str],
) -> Outputs:
    out = run.attempt(stage.name, number) / "out"
    result = atomic.read_json(out / work.RESULT)
    if result is None:
        raise StageFailed(f"it ended well but wrote no {work.RESULT}; log: {out.parent / 'stdout.log'}", number)
    artifacts = {}
    for name, relative in result["artifacts"].items():
        path = out / relative
        sha256, size = hashing.hash_tree(path)
        artifacts[name] = Artifact(str(path.relative_to(run.root)), sha256, size)
    values = {**result["values"], **made_in}
    outputs = Outputs(stage.name, fingerprint, number, artifacts, values, known, time.time(), seconds, submission)
    run.write_outputs(outputs)
    link_artifacts(run, stage.name, artifacts)
    return outputs


def link_artifacts(run: RunDir, stage: str, artifacts: Mapping[str, Artifact]) -> None:
    """Show a finished stage's artifacts at the top of the run directory; of an SFT or reward model what goes on."""
    for name, artifact in artifacts.items():
        link, shown = _LINKS.get(name), artifact
        if name == "model":
            link, shown = f"models/{stage}", artifacts.get("best", artifact)
        if link:
            atomic.replace_symlink(run.root / link, run.root / shown.path)


def prune(run: RunDir, stage: str, keep: int) -> None:
    """Remove what earlier attempts made; their logs stay."""
    for folder in (run.stage(stage) / "attempts").iterdir():
        if folder.name != f"{keep:04d}" and (folder / "out").is_dir():
            shutil.rmtree(folder / "out")


def _prune_checkpoints(run: RunDir, stage: str, keep: str) -> None:
    """Remove the checkpoints of the stage's trainings that are no longer the run's: with other settings, or redone by
    force. Of a finished SFT or reward model, whose artifact says it all, only the metrics stay."""
    folders = list(run.checkpoints.iterdir()) if run.checkpoints.is_dir() else []
    for folder in folders:
        if stage_of(folder.name) != stage:
            continue
        if folder.name != keep:
            shutil.rmtree(folder)
        elif stage in SUPERVISED:
            (folder / "latest").unlink(missing_ok=True)
            for checkpoint in folder.glob("step-*"):
                shutil.rmtree(checkpoint)


def next_attempt(run: RunDir, stage: str) -> int:
    """Claim the next attempt's folder; creating it is what decides between two jobs."""
    attempts = run.stage(stage) / "attempts"
    with atomic.disk_errors(attempts):
        attempts.mkdir(parents=True, exist_ok=True)
    number = max((int(folder.name) for folder in attempts.iterdir() if folder.name.isdigit()), default=0) + 1
    try:
        run.attempt(stage, number).mkdir()
    except FileExistsError:
        raise UserError(f"{attempts}: another job started attempt {number} at the same moment; submit again") from None
    return number


def _job_ids() -> dict[str, str]:
    names = ("SUBMITIT_LOCAL_JOB_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURMD_NODENAME")
    ids = {name.lower(): value for name in names if (value := os.environ.get(name))}
    return ids | ({"slurm_job_id": job} if (job := slurm.job_id()) else {})
