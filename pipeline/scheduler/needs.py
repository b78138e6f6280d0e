"""What the stages of a run turned out to need, so that a later job asks for it at once.

stages/<stage>/needs.json is written by a retry; a job that died with nobody there to try again left its end at Slurm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.config.cluster import Cluster
from pipeline.run import atomic
from pipeline.run.directory import RunDir
from pipeline.scheduler import slurm
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.options import job_resources
from pipeline.scheduler.retries import grown
from pipeline.scheduler.state import recorded_state
from pipeline.stages.plan import Planned


@dataclass(frozen=True)
class Need:
    """0: as the profile says."""

    mem_gb: int = 0
    time_min: int = 0
    reason: str = ""


def remember(run: RunDir, stage: str, found: Need) -> None:
    """Have later jobs of the stage ask for no less."""
    old = recorded(run, stage)
    most = Need(max(old.mem_gb, found.mem_gb), max(old.time_min, found.time_min), found.reason)
    atomic.write_json(_file(run, stage), asdict(most))


def recorded(run: RunDir, stage: str) -> Need:
    """What was remembered of a stage."""
    raw = atomic.read_json(_file(run, stage))
    return Need(**raw) if raw is not None else Need()


def apply(run: RunDir, cluster: Cluster, plan: Sequence[Planned]) -> list[Planned]:
    """The plan, in which stages ask for what they are known to need where that is more than the profile's."""
    if cluster.executor != "slurm" or not cluster.retries:
        return list(plan)
    return [each if each.action == "skip" else _with_need(run, cluster, each) for each in plan]


def _with_need(run: RunDir, cluster: Cluster, planned: Planned) -> Planned:
    profile, known = cluster.resources(planned.stage), recorded(run, planned.stage)
    died = _after_death(run, cluster, planned.stage)
    mem_gb = min(max(known.mem_gb, died.mem_gb), cluster.max_mem_gb or 10**9)
    time_min = min(max(known.time_min, died.time_min), cluster.max_time_min or 10**9)
    mem_gb, time_min = (mem_gb > profile.mem_gb) * mem_gb, (time_min > profile.time_min) * time_min
    asks = [f"{amount} {unit}" for amount, unit in ((mem_gb, "GB"), (time_min, "min")) if amount]
    if not asks:
        return planned
    reason = f"{planned.reason}; asks for {' and '.join(asks)}: {died.reason or known.reason}"
    return replace(planned, reason=reason, mem_gb=mem_gb, time_min=time_min)


def _after_death(run: RunDir, cluster: Cluster, stage: str) -> Need:
    """More than the stage's last job had, if that ended for want of it and nothing of it was left to try again."""
    last = submissions.read(run)
    job, state = last.job_of(stage) if last else None, recorded_state(run, stage)
    if last is None or job is None or job.job_id is None or job.stages[-1] != stage or last.executor != "slurm":
        return Need()
    if state is not None and state.submission == last.id and state.ended:
        return Need()
    asked, end = job_resources(cluster, job), slurm.end_state(job.job_id)
    if end == "OUT_OF_MEMORY":
        more, _ = grown(cluster, asked.mem_gb, cluster.max_mem_gb, 0, "")
        return Need(mem_gb=more, reason=f"job {job.job_id} ran out of memory")
    if end == "TIMEOUT":
        more, _ = grown(cluster, asked.time_min, cluster.max_time_min, 0, "")
        return Need(time_min=more, reason=f"job {job.job_id} reached its time limit")
    return Need()


def _file(run: RunDir, stage: str) -> Path:
    return run.stage(stage) / "needs.json"
