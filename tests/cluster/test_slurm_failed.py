"""Stages that fail by themselves or whose job is cancelled, what waits for them, and scripts submitted again by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers_cluster import CHAIN_SETTINGS, children, profile, states, tasks
from helpers_jobs import command, copy_without, nothing_left, policy_sha256, start, submit, until_training, wait_for
from mini_slurm import MiniSlurm

from pipeline.run import endpoint
from pipeline.run.directory import RunDir

pytestmark = [pytest.mark.slurm, pytest.mark.triton, pytest.mark.chain]


def queue_empty(slurm: MiniSlurm) -> bool:
    return not slurm.command("squeue", "-h").strip()


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
    wait_for(lambda: queue_empty(slurm), "the dependents to leave the queue", 30)
    seen = states(run)
    assert seen.pop("prefetch") == ("failed", "")
    assert seen.pop("sandbox")[0] == "done"  # it waits for nothing
    assert {stage: state for stage, (state, _) in seen.items()} == dict.fromkeys(seen, "cancelled")
    assert seen["sft"][1] == seen["reward-model"][1] == "prefetch failed"
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
    wait_for(lambda: queue_empty(slurm), "the dependents to leave the queue", 30)
    seen = states(run)
    assert (seen["sft"][0], "train.jsonl" in seen["sft"][1]) == ("failed", True), seen
    assert (seen["train"], seen["evaluate"]) == (("cancelled", "sft failed"), ("cancelled", "train cancelled"))
    data.write_bytes(whole)
    for job in ("sft", "serve+train", "evaluate"):
        (script,) = run.glob(f"jobs/*-{job}/*_submission.sh")
        assert slurm.command("sbatch", str(script)).startswith("Submitted batch job")
        wait_for(lambda: queue_empty(slurm), f"{job} to end")
    seen = states(run)
    assert {stage: state for stage, (state, _) in seen.items() if stage in ("sft", "train", "evaluate")} == {
        "sft": "done",
        "train": "skipped",  # the same start gives the same policy
        "evaluate": "done",
    }
    assert RunDir(run).values("evaluate") == RunDir(finished).values("evaluate")
