"""Broken nodes and the jobs that wait already: later submissions leave such a node out, those in the queue are told."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence

from pipeline.errors import UserError
from pipeline.procs import NoAnswer
from pipeline.run.directory import RunDir
from pipeline.scheduler import slurm
from pipeline.scheduler import submission as submissions

log = logging.getLogger("pipeline")


def avoid(run: RunDir, submission: str, node: str) -> None:
    """Have the other waiting jobs of the submission avoid a node, each where enough others could take it."""

    def wanted(fields: Mapping[str, str], excluded: frozenset[str]) -> frozenset[str]:
        others = slurm.nodes(fields.get("Partition", "")).keys() - excluded - {node}
        needed = re.match(r"\d+", fields.get("NumNodes", ""))
        return excluded | {node} if len(others) >= int(needed[0] if needed else 1) else excluded

    _change(run, submission, wanted)


def allow(run: RunDir, submission: str, nodes: Sequence[str], kept: Sequence[str]) -> None:
    """Let them use nodes again, but for those of `kept`, which the profile leaves out."""
    again = frozenset(nodes) - frozenset(kept)
    _change(run, submission, lambda fields, excluded: excluded - again)


def _change(
    run: RunDir, submission_id: str, wanted: Callable[[Mapping[str, str], frozenset[str]], frozenset[str]]
) -> None:
    """Change which nodes the submission's waiting jobs avoid: from their fields and what they avoid now.

    Whatever Slurm says to that, it must not end what the caller is about: the job would fail there, and try again.
    """
    submission = submissions.find(run, submission_id)
    for job in [job.job_id for job in submission.jobs if job.job_id] if submission is not None else []:
        try:
            fields = slurm.show(job) if job != slurm.job_id() else {}
            if fields.get("JobState") != "PENDING":
                continue
            before = fields.get("ExcNodeList", "(null)")
            excluded = slurm.hostnames(before)
            now = wanted(fields, excluded)
            if not excluded and before not in ("", "(null)"):
                raise UserError(f"scontrol show hostnames {before}: no answer")
            if now != excluded:
                slurm.update(job, {"ExcNodeList": ",".join(sorted(now))})
        except NoAnswer as silence:
            log.warning("waiting jobs may still run on a broken node: %s", silence)
            return
        except UserError as refusal:
            log.warning("job %s may still run on a broken node: %s", job, refusal)
