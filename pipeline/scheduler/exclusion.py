"""Broken nodes and the jobs that wait already: later submissions leave such a node out, those in the queue are told."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from pipeline.errors import UserError
from pipeline.run.directory import RunDir
from pipeline.scheduler import slurm
from pipeline.scheduler import submission as submissions

log = logging.getLogger("pipeline")


def avoid(run: RunDir, submission: str, node: str) -> None:
    """Have the other waiting jobs of the submission avoid a node, each where enough others could take it."""
    for job, fields in _waiting(run, submission):
        excluded = slurm.hostnames(fields.get("ExcNodeList", ""))
        others = slurm.nodes(fields.get("Partition", "")).keys() - excluded - {node}
        if node not in excluded and len(others) >= int(fields.get("NumNodes", "1").partition("-")[0]):
            _exclude(job, excluded | {node})


def allow(run: RunDir, submission: str, nodes: Sequence[str], kept: Sequence[str]) -> None:
    """Let them use nodes again, but for those of `kept`, which the profile leaves out."""
    for job, fields in _waiting(run, submission):
        excluded = slurm.hostnames(fields.get("ExcNodeList", ""))
        left = excluded - (set(nodes) - set(kept))
        if left != excluded:
            _exclude(job, left)


def _waiting(run: RunDir, submission_id: str) -> list[tuple[str, Mapping[str, str]]]:
    """(id, Slurm's fields) of the submission's jobs that wait in the queue."""
    submission = submissions.find(run, submission_id)
    ids = [job.job_id for job in submission.jobs if job.job_id] if submission is not None else []
    shown = ((job, slurm.show(job)) for job in ids if job != slurm.job_id())
    return [(job, fields) for job, fields in shown if fields.get("JobState") == "PENDING"]


def _exclude(job: str, nodes: frozenset[str]) -> None:
    """Whatever Slurm says to that, it must not end what the caller is about: the job fails and tries again then."""
    try:
        slurm.update(job, {"ExcNodeList": ",".join(sorted(nodes))})
    except UserError as refusal:
        log.warning("job %s may still run on a broken node: %s", job, refusal)
