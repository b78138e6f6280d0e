"""Stages that fail or are cancelled and what waits for them; scripts submitted again by hand; paths."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from helpers_cluster import CHAIN_SETTINGS, children, environment_of, profile, separate, states, tasks
from helpers_jobs import command, copy_without, nothing_left, pids_running, start, submit, until_training, wait_for
from mini_slurm import MiniSlurm

from pipeline.run import endpoint
from pipeline.run.directory import RunDir
from pipeline.scheduler import submission as submissions

pytestmark = [pytest.mark.slurm, pytest.mark.triton, pytest.mark.chain]


def test_a_broken_data_file_fails_its_stage_and_what_waits_for_it_leaves_the_queue(
    slurm: MiniSlurm, tmp_path: Path
) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    for split in ("train", "test"):
        (rows / f"{split}.jsonl").write_text('{"chosen": "no dialogue"\n')
    run = tmp_path / "run"
    settings = (*CHAIN_SETTINGS, f"data.source={rows}")
    done = submit(run, "--cluster", slurm.folder / "profile.yaml", "--no-follow", overrides=settings)
    assert done.status == 0, done.err
    wait_for(slurm.empty, "the dependents to leave the queue")
    seen = states(run)
    reason = "not valid JSON (Expecting ',' delimiter: line 2 column 1 (char 25)); correct or remove the line"
    assert seen.pop("prefetch") == ("failed", f"{rows / 'train.jsonl'}:1: {reason}")
    assert {stage: state for stage, (state, _) in seen.items()} == dict.fromkeys(seen, "cancelled")
    assert seen["sft"][1] == seen["reward-model"][1] == seen["sandbox"][1] == "prefetch failed"
    assert seen["evaluate"][1] == "prefetch failed"  # the first of those that it needs


def test_a_failed_stages_script_can_be_submitted_again_by_hand_and_then_those_behind_it(
    slurm: MiniSlurm, finished: Path, tmp_path: Path
) -> None:
    run = copy_without(finished, tmp_path / "run", "sft", "evaluate")
    data = run.resolve() / "data" / "train.jsonl"
    whole = data.read_bytes()
    data.write_bytes(b"x" * len(whole))
    arguments = ("--cluster", slurm.folder / "profile.yaml", "--no-follow")
    assert submit(run, *arguments, overrides=CHAIN_SETTINGS).status == 0
    wait_for(slurm.empty, "the dependents to leave the queue")
    seen = states(run)
    assert (seen["sft"][0], "train.jsonl" in seen["sft"][1]) == ("failed", True), seen
    assert (seen["train"], seen["evaluate"]) == (("cancelled", "sft failed"),) * 2
    data.write_bytes(whole)
    submission = submissions.read(RunDir(run))
    assert submission is not None
    for job in submission.jobs:
        (script,) = run.glob(f"jobs/{submission.id}-{job.name}/*_submission.sh")
        assert slurm.command("sbatch", str(script)).startswith("Submitted batch job")
        wait_for(slurm.empty, f"{job.name} to end")
    seen = states(run)
    assert (seen["sft"][0], seen["evaluate"][0]) == ("done", "done")
    assert [seen[stage][0] for stage in ("reward-model", "convert", "train")] == ["skipped"] * 3  # of the same content
    assert RunDir(run).values("evaluate") == RunDir(finished).values("evaluate")


def test_a_job_that_never_comes_to_say_anything_has_failed(slurm: MiniSlurm, finished: Path, tmp_path: Path) -> None:
    run = copy_without(finished, tmp_path / "run", "evaluate")
    site = profile(slurm.folder, "broken", setup=["exit 3"])
    done = submit(run, "--stage", "evaluate", "--cluster", site, overrides=CHAIN_SETTINGS)
    assert (done.status, "error: evaluate: died (job " in done.err) == (1, True), done.err
    assert "Traceback" not in done.err


def test_a_cancelled_job_that_waits_takes_those_behind_it_along_and_no_others(
    slurm: MiniSlurm, finished: Path, tmp_path: Path
) -> None:
    run = copy_without(finished, tmp_path / "run", "convert", "evaluate")
    arguments = ("--cluster", slurm.folder / "profile.yaml", "--no-follow")
    assert submit(run, *arguments, overrides=CHAIN_SETTINGS).status == 0
    slurm.command("scancel", "--state=PENDING", "--name=hh-serve+train")
    wait_for(slurm.empty, "the jobs to leave the queue")
    seen = states(run)
    assert seen["convert"][0] == "done"
    assert (seen["train"][0], "it was cancelled by scancel" in seen["train"][1]) == ("cancelled", True), seen
    assert seen["evaluate"] == ("cancelled", "train cancelled")


def test_a_training_goes_on_with_the_server_that_is_left_and_ends_when_their_job_is_cancelled(
    slurm: MiniSlurm, finished: Path, tmp_path: Path
) -> None:
    run = until_training(finished, tmp_path / "run")
    arguments = ("--stage", "serve,train,evaluate", "--cluster", separate(slurm.folder, servers=2), "--no-follow")
    endless = ("train.total_steps=1000", "train.eval_interval=1000")  # for who cancels it three times
    settings = (*CHAIN_SETTINGS, *endless, "serving.retry_timeout_s=5")  # which does not wait for the one that is gone
    assert submit(run, *arguments, overrides=settings).status == 0
    wait_for(lambda: len(endpoint.read_all(RunDir(run))) == 2, "both servers")
    log = run / "stages" / "train" / "attempts" / "0001" / "stdout.log"
    said = "gives the known answers"
    wait_for(lambda: log.exists() and log.read_text().count(said) >= 2, "the first rank to use both")
    servers = {environment_of(pid)["SLURM_PROCID"]: pid for pid in tasks(run, "serve")}
    assert len({environment_of(pid)["SLURMD_NODENAME"] for pid in servers.values()}) == 2
    os.kill(servers["1"], signal.SIGKILL)  # which both ranks ask in turn with the other
    wait_for(lambda: len(pids_running(run, "tritonserver --")) == 1, "its server to end with it")
    reached = last_checkpoint(run)
    wait_for(lambda: last_checkpoint(run) >= reached + 12, "the training to go on")
    assert "no reward server answers" in log.read_text()  # and another one did
    assert [states(run)[stage][0] for stage in ("serve", "train")] == ["running"] * 2

    slurm.command("scancel", "--name=hh-serve")
    wait_for(slurm.empty, "the jobs to leave the queue")
    seen = states(run)
    assert seen["serve"][0] == "cancelled"
    assert (seen["train"][0], "its reward server is gone: serve cancelled" in seen["train"][1]) == ("failed", True), (
        seen
    )
    assert seen["evaluate"] == ("cancelled", "train failed")
    assert [path.name for path in (run / "stages" / "train" / "attempts").iterdir()] == ["0001"]
    assert endpoint.read(RunDir(run)) is None

    submit_again(slurm, run, "train", "serve")
    reached = last_checkpoint(run)
    wait_for(lambda: last_checkpoint(run) > reached, "the training to go on with the new server", 180)
    slurm.command("scancel", "--name=hh-train")
    wait_for(slurm.empty, "the server to end with it", 180)
    seen = states(run)
    assert (seen["serve"], seen["train"][0]) == (("done", "ended with the training that it served"), "cancelled"), seen

    submit_again(slurm, run, "serve", "train")
    reached = last_checkpoint(run)
    wait_for(lambda: last_checkpoint(run) > reached, "the training to go on once more", 180)
    assert "cancelled serve, train" in command("cancel", run).out
    wait_for(lambda: nothing_left(run), "every process to end", 20)


def submit_again(slurm: MiniSlurm, run: Path, *stages: str) -> None:
    """Submit jobs' scripts by hand, each once the one before has started."""
    submission = submissions.read(RunDir(run))
    assert submission is not None
    for stage in stages:
        (script,) = run.glob(f"jobs/{submission.id}-{stage}/*_submission.sh")
        slurm.command("sbatch", str(script))
        wait_for(lambda stage=stage: states(run)[stage][0] in ("pending", "running"), f"{stage} to start")


def last_checkpoint(run: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/*/step-????????")), default=0)


def test_two_submitters_at_once_make_one_submission(slurm: MiniSlurm, finished: Path, tmp_path: Path) -> None:
    run = copy_without(finished, tmp_path / "run", "evaluate")
    arguments = ("--stage", "evaluate", "--cluster", slurm.folder / "profile.yaml")
    both = [start(run, *arguments, overrides=CHAIN_SETTINGS) for _ in range(2)]
    assert sorted(process.wait(120) for process in both) in (
        [0, 0],
        [0, 2],
    )  # the later one follows, or is told to wait
    assert len(list(run.glob("jobs/*-evaluate"))) == 2  # with the finished run's
    assert [path.name for path in (run / "stages" / "evaluate" / "attempts").iterdir()] == ["0001"]
    assert RunDir(run).values("evaluate") == RunDir(finished).values("evaluate")


def test_commands_take_a_path_with_whatever_a_shell_or_slurm_finds_special(slurm: MiniSlurm, tmp_path: Path) -> None:
    run = tmp_path / """a "=0" #b' $HOME; echo 'ü" *"""
    arguments = ("--stage", "prefetch,sft", "--cluster", slurm.folder / "profile.yaml", "--no-follow")
    done = submit(run, *arguments, overrides=CHAIN_SETTINGS)
    assert done.status == 0, done.err
    wait_for(lambda: children(tasks(run, "sft")), "the work of sft")
    status, logs = command("status", run), command("logs", run, "prefetch")
    assert (status.status, states(run)["prefetch"][0], states(run)["sft"][0]) == (0, "done", "running"), status
    assert (logs.status, "96 training and 24 test pairs" in logs.out) == (0, True), logs
    assert "cancelled sft" in command("cancel", run).out
    assert slurm.empty()
    wait_for(lambda: nothing_left(run), "every process to end", 20)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("a\nb", "an sbatch script holds no control character"), ("a\\b", "Slurm gives % and \\ a meaning")],
)
def test_a_path_that_no_script_can_carry_is_refused(slurm: MiniSlurm, tmp_path: Path, name: str, reason: str) -> None:
    refused = submit(tmp_path / name, "--cluster", slurm.folder / "profile.yaml", overrides=CHAIN_SETTINGS)
    assert (refused.status, reason in refused.err) == (2, True), refused
    assert "choose a path without it" in refused.err
