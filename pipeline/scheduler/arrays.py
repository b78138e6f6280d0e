"""Job arrays: runs whose jobs are alike share one array for each job, in which task i is the i-th run's job.

arrays/<submission>/ in the folder of such runs holds a link <i> to each task's run, and the scripts. Slurm writes a
task's logs through the link, and the script finds its run by it; so all else of a run is where it always is.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import procs
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.run import bad_nodes, snapshot
from pipeline.run.directory import RunDir
from pipeline.scheduler import executor, script, slurm
from pipeline.scheduler import submission as submissions
from pipeline.scheduler.options import Where
from pipeline.scheduler.script import Target
from pipeline.scheduler.submission import JOBS, Job, Submission, job_folder
from pipeline.scheduler.submit import describe, group_jobs, new_id, record
from pipeline.stages.plan import Planned

ARRAYS = "arrays"
_RUN = '"$hh_run"'
"""A task's run directory, to its shell."""
_NO_ARRAYS = "Invalid job array specification"
"""sbatch's words where a site has no arrays, or none of so many tasks (MaxArraySize)."""


@dataclass(frozen=True)
class Member:
    """A run that may be part of arrays; while they are submitted, the caller holds its lock."""

    run: RunDir
    config: Config
    plan: tuple[Planned, ...]
    forced: tuple[str, ...] = ()

    @property
    def jobs(self) -> tuple[Job, ...]:
        """What has to be submitted of it."""
        return group_jobs(self.config, self.plan)


def alike(members: Sequence[Member]) -> list[list[Member]]:
    """The members in groups, each of which can share arrays: their jobs, and the scripts of these, are the same."""
    groups: dict[object, list[Member]] = {}
    for member in members:
        shape = tuple((job, _render(member, job)) for job in member.jobs)
        groups.setdefault(shape if member.config.cluster.job_arrays else member.run.root, []).append(member)
    return list(groups.values())


def submit(folder: Path, members: Sequence[Member], at_once: int | None = None) -> list[Submission]:
    """Submit the jobs of members that are alike as arrays, and record each member's as soon as it is known: all of
    them, or none."""
    submission_id = new_id()
    array = folder / ARRAYS / submission_id
    array.mkdir(parents=True)
    submitted = []
    for task, member in enumerate(members):
        described = describe(submission_id, member.config, member.plan, member.forced)
        submitted.append(replace(described, array=str(array), task=task))
        record(member.run, member.config, member.plan, submitted[-1])
        snapshot.take(member.run)
        for job in described.jobs:
            job_folder(member.run, submission_id, job).mkdir(parents=True)
        (array / str(task)).symlink_to(member.run.root)
    log = array.with_name("controllers.log")
    procs.in_new_session(lambda: _submit_all(members, submitted, at_once), log)
    recorded = [submissions.find(member.run, submission_id) for member in members]
    assert all(recorded)
    return [one for one in recorded if one]


def refused(error: UserError) -> bool:
    """Whether sbatch takes no such array here, though it may take the same jobs one by one."""
    return _NO_ARRAYS in str(error)


def target(
    array: Path, submission: str, job: Job, code: str, avoided: Sequence[str], tasks: int, at_once: int | None
) -> Target:
    """What the script of an array does: its tasks find their runs by their numbers."""
    link = f'{shlex.quote(str(array))}/"$SLURM_ARRAY_TASK_ID"'
    return Target(
        folder=array / job.name,
        where=Where(_RUN, f"{_RUN}/code/{code}"),
        avoided=tuple(avoided),
        logs=array / "%a" / JOBS / f"{submission}-{job.name}",
        find=(
            f"hh_run=$(readlink {link}) || exit 1",
            f"export {slurm.TASK_MARK}=$SLURM_JOB_ID:${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID",
        ),
        tasks=tasks,
        at_once=at_once,
    )


def _render(member: Member, job: Job) -> str:
    """The script of a member's array, but for what a submission decides: two that differ cannot be one."""
    of_any = target(Path("/"), "", job, "", _avoided(member.run), 1, None)
    return script.render_for(of_any, "", member.config.cluster, job)


def _avoided(run: RunDir) -> tuple[str, ...]:
    return tuple(node.node for node in bad_nodes.known(run))


def _submit_all(members: Sequence[Member], submitted: list[Submission], at_once: int | None) -> None:
    executor.leave_surroundings()
    first, cluster = members[0], members[0].config.cluster
    array, submission_id = Path(str(submitted[0].array)), submitted[0].id
    code = snapshot.folder(first.run).name
    ids: list[str] = []
    try:
        for job in submitted[0].jobs:
            script_of = target(array, submission_id, job, code, _avoided(first.run), len(members), at_once)
            waits = [executor.depends_on(submission, job) for submission in submitted]
            held = len(set(waits)) > 1  # until each task has been told which task of a server must have started
            ids.append(script.submit(script_of, submission_id, cluster, job, None if held else waits[0], held))
            if held:
                for task, depends in enumerate(waits):
                    slurm.update(f"{ids[-1]}_{task}", {"Dependency": depends or ""})
                if not cluster.extra.get("hold"):
                    slurm.release(ids[-1])
            for task, member in enumerate(members):
                submitted[task] = submitted[task].with_job(replace(job, job_id=f"{ids[-1]}_{task}"))
                submissions.write(member.run, submitted[task])
    except BaseException as error:
        try:
            slurm.cancel(ids)
        except UserError as more:
            raise UserError(f"{error}; its other jobs are in the queue still: {more}") from error
        for member, submission in zip(members, submitted, strict=True):
            executor.record_taken_back(member.run, submission, error)
        raise
