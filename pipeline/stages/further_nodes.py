"""The further nodes of an allocation: a job that is a process on its first node starts a task on each of them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from pipeline import procs
from pipeline.config.cluster import Cluster
from pipeline.run.directory import RunDir
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.options import shell_command
from pipeline.scheduler.submission import Job, Submission
from pipeline.stages.nodes import FOLLOWS, MEETING, SPREAD, Meeting, Nodes

_GRACE_S = 45.0
"""What ending a task of theirs may take: its training has time to save."""
_END_S = 60.0
"""Seconds in which the followers, told by files that the work is over, end by themselves."""


@contextlib.contextmanager
def started(run: RunDir, cluster: Cluster, submission: Submission, job: Job, nodes: Nodes) -> Iterator[None]:
    """Have a task of the job on each further node while the block runs. srun starts those of a Slurm job itself."""
    if MEETING not in os.environ or nodes.count == 1 or not SPREAD.intersection(job.stages):
        yield
        return
    code = Path(__file__).resolve().parents[2]  # this job runs the code of its submission
    work = shell_command(sys.executable, cluster, run.root, code, job, submission.id)
    env = {key: value for key, value in os.environ.items() if not key.startswith("SUBMITIT_")} | {FOLLOWS: "1"}
    with (submissions.job_folder(run, submission.id, job) / "followers_log.err").open("ab") as output:
        child = procs.spawn([*_srun(cluster, nodes), *work], env=env, output=output)
    try:
        yield
        Meeting(run).end()  # whether or not there was anything to do
        with contextlib.suppress(procs.WaitTimeout):
            child.wait(_END_S)
    finally:
        procs.end_tree(child, _GRACE_S)


def _srun(cluster: Cluster, nodes: Nodes) -> list[str]:
    """One task on each node but this one, beside whatever else runs in the allocation."""
    others = str(nodes.count - 1)
    return [
        *("srun", "--overlap", f"--nodes={others}", f"--ntasks={others}", "--ntasks-per-node=1"),
        *(f"--exclude={os.environ['SLURMD_NODENAME']}", *cluster.srun_args, "--wait=0", "--kill-on-bad-exit=0"),
    ]
