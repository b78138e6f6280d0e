"""Job arrays: runs whose jobs are alike share one array for each job, in which task i is the i-th run's job.

arrays/<submission>/ in the folder of such runs holds a link <i> to each task's run, and the scripts. Slurm writes a
task's logs through the link, and the script finds its run by it; so all else of a run is where it always is.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Sequence
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

log = logging.getLogger("pipeline")

ARRAYS = "arrays"
_RUN = '"$hh_run"'
"""A task's run directory, to its shell."""
_NO_ARRAYS = "Invalid job array specification"
"""sbatch's words where a site has no arrays, or none of so many tasks (MaxArraySize)."""
_CORRESPONDING = 10
"""Tasks of an array up to which Slurm compares each with the task of its number as soon as it is submitted
(correspond_after_task_cnt, 10 unless a site says otherwise). Of more, those that Slurm has not looked at when it
forgets the array before (MinJobAge) would depend on the whole of it."""


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
    """The members in groups, each of which can share arrays: their jobs, and the scripts of these, are the same.

    Nodes that are known to be broken do not part them: an array avoids those of all its members.
    """
    groups: dict[object, list[Member]] = {}
    for member in members:
        shape = tuple((job, _render(member, job)) for job in member.jobs)
        groups.setdefault(shape if member.config.cluster.job_arrays else member.run.root, []).append(member)
    return list(groups.values())


def submit(folder: Path, members: Sequence[Member], at_once: int | None = None) -> list[Submission]:
    """Submit the jobs of members that are alike as arrays, and record each job's id as soon as it is known: all of
    them, or none."""
    codes = {snapshot.take(member.run).name for member in members}
    if len(codes) > 1:
        raise UserError(f"{folder}: the project's code was changed while its points took copies of it; submit again")
    (code,) = codes
    submission_id = new_id()
    array = folder / ARRAYS / submission_id
    array.mkdir(parents=True)
    submitted = []
    for task, member in enumerate(members):
        described = describe(submission_id, member.config, member.plan, member.forced)
        submitted.append(replace(described, array=str(array), task=task))
        record(member.run, member.config, member.plan, submitted[-1])
        for job in described.jobs:
            job_folder(member.run, submission_id, job).mkdir(parents=True)
        (array / str(task)).symlink_to(member.run.root)
    log_file = array.with_name("controllers.log")
    procs.in_new_session(lambda: _submit_all(members, submitted, code, at_once), log_file)
    recorded = [submissions.find(member.run, submission_id) for member in members]
    assert all(recorded)
    return [one for one in recorded if one]


def refused(error: UserError) -> bool:
    """Whether sbatch takes no such array here, though it may take the same jobs one by one: of a limit to submitted
    jobs, each task takes a part."""
    return _NO_ARRAYS in str(error) or script.queue_full(error)


def target(
    array: Path, submission: str, job: Job, code: str, avoided: Sequence[str], tasks: int, at_once: int | None
) -> Target:
    """What the script of an array does: its tasks find their runs by their numbers."""
    link = f'{shlex.quote(str(array))}/"$SLURM_ARRAY_TASK_ID"'
    copy = f"{_RUN}/code/{code}"
    no_run = f"echo 'error: '{link}': names no run; the sweep was moved, or has no such point' >&2; exit 1"
    no_code = f"echo 'error: '{copy}': the code that was submitted is gone; submit again' >&2; exit 1"
    return Target(
        folder=array / job.name,
        where=Where(_RUN, copy),
        avoided=tuple(avoided),
        logs=array / "%a" / JOBS / f"{submission}-{job.name}",
        find=(
            f"hh_run=$(readlink {link}) || {{ {no_run}; }}",
            f"[ -d {copy} ] || {{ {no_code}; }}",
            f"export {slurm.TASK_MARK}=$SLURM_JOB_ID:${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID",
        ),
        tasks=tasks,
        at_once=at_once,
    )


def _render(member: Member, job: Job) -> str:
    """The script of a member's array, but for what a submission decides: two that differ cannot be one."""
    of_any = target(Path("/"), "", job, "", (), 1, None)
    return script.render_for(of_any, "", member.config.cluster, job)


def _submit_all(members: Sequence[Member], submitted: list[Submission], code: str, at_once: int | None) -> None:
    executor.leave_surroundings()
    cluster, array, submission_id = members[0].config.cluster, Path(str(submitted[0].array)), submitted[0].id
    avoided = sorted({node.node for member in members for node in bad_nodes.known(member.run)})
    submitted[:] = [replace(each, time=time.time()) for each in submitted]  # to prepare all of them may take minutes
    ids: list[str] = []
    try:
        _write(members, submitted)
        for job in submitted[0].jobs:
            script_of = target(array, submission_id, job, code, avoided, len(members), at_once)
            whole = executor.corresponds_to(submitted[0], job)
            # Held until each task has been told what it waits for: a server's task, or one of many.
            held = bool(job.beside) or (whole is not None and len(members) > _CORRESPONDING)
            ids.append(script.submit(script_of, submission_id, cluster, job, whole, held))
            for task, submission in enumerate(submitted):
                submitted[task] = submission.with_job(replace(job, job_id=f"{ids[-1]}_{task}"))
            _write(members, submitted)
            if held:
                for task, submission in enumerate(submitted):
                    changes = {"Dependency": executor.depends_on(submission, job) or ""}
                    _insist(slurm.update, f"{ids[-1]}_{task}", changes)
                if not cluster.extra.get("hold"):
                    _insist(slurm.release, ids[-1])
    except BaseException as error:
        try:
            slurm.cancel(ids)
        except UserError as more:
            raise UserError(f"{error}; its other jobs are in the queue still: {more}") from error
        for member, submission in zip(members, submitted, strict=True):
            executor.record_taken_back(member.run, submission, error)
        raise


def _write(members: Sequence[Member], submitted: Sequence[Submission]) -> None:
    for member, submission in zip(members, submitted, strict=True):
        submissions.write(member.run, submission)


def _insist(order: Callable[..., None], *words: object) -> None:
    """Give an order again while the controller is silent, as often as sbatch's."""
    for wait_s in script.RETRY_S:
        try:
            return order(*words)
        except procs.NoAnswer as silence:
            log.info("%s; tried again in %.0f s", silence, wait_s)
            time.sleep(wait_s)
    try:
        return order(*words)
    except procs.NoAnswer as silence:
        raise UserError(str(silence)) from silence
