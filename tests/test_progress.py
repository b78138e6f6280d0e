"""What counts as progress of a training that was interrupted."""

from __future__ import annotations

from pathlib import Path

from pipeline.run.directory import RunDir
from pipeline.run.progress import saved_steps


def test_only_a_complete_checkpoint_of_a_higher_step_is_progress(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert saved_steps(run) == 0

    def save(name: str) -> int:
        (run.checkpoints / name).mkdir(parents=True)
        return saved_steps(run)

    assert save("old/step-00000096") == 96
    assert save("old/step-00000104.unfinished") == 96
    assert save("old/step-00000088") == 96  # an earlier step, saved again after a damaged checkpoint
    (run.checkpoints / "old" / "latest").symlink_to("step-00000096")
    assert saved_steps(run) == 96


def test_a_training_that_begins_anew_beside_an_older_one_makes_progress_from_its_first_checkpoint(
    tmp_path: Path,
) -> None:
    run = RunDir(tmp_path)
    (run.checkpoints / "settings-a" / "step-00000096").mkdir(parents=True)
    before = saved_steps(run)
    (run.checkpoints / "settings-b" / "step-00000008").mkdir(parents=True)
    assert saved_steps(run) > before
