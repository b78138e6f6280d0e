"""The trainer's image is one and the same for all jobs of a submission, and recorded with what it made."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pipeline.config.load import check
from pipeline.config.schema import Config
from pipeline.containers.trainer import check_image, image_digest
from pipeline.errors import UserError
from pipeline.run import provenance
from pipeline.run.directory import RunDir
from pipeline.run.hashing import HashCache
from pipeline.stages.base import Context
from pipeline.stages.execute import run_stage


def config_of(image: Path) -> Config:
    return check({"cluster": {"executor": "slurm", "trainer_image": str(image)}})


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Submitted with an image that is a file."""
    image = tmp_path / "trainer.sif"
    image.write_bytes(b"torch 2")
    hashes = HashCache(tmp_path / "hashes.json")
    provenance.write(RunDir(tmp_path), str(image), image_digest(config_of(image), hashes))
    return RunDir(tmp_path)


def test_its_content_is_recorded_with_the_submission(run: RunDir) -> None:
    image = run.root / "trainer.sif"
    assert provenance.trainer_image(run) == {"file": str(image), "digest": hashlib.sha256(b"torch 2").hexdigest()}
    provenance.write(run)
    assert provenance.trainer_image(run) is None


def test_a_job_that_finds_another_image_there_does_not_begin(run: RunDir) -> None:
    image = run.root / "trainer.sif"
    config = config_of(image)
    check_image(run, config, image_digest(config, HashCache(run.root / "x.json")))
    image.write_bytes(b"torch 3")
    context = Context(run, config, HashCache(run.root / "hashes.json"))
    with pytest.raises(UserError, match=r"trainer.sif: it has changed since this was submitted .*; submit again"):
        run_stage(context, "reward-model", "s1", "first run")
    assert not run.attempt("reward-model", 1).exists()


def test_an_image_that_only_the_nodes_have_is_recorded_by_their_jobs_alone(tmp_path: Path) -> None:
    run, config = RunDir(tmp_path), config_of(tmp_path / "of the nodes.sif")
    assert image_digest(config, HashCache(tmp_path / "hashes.json")) is None
    provenance.write(run, config.cluster.trainer_image, None)
    check_image(run, config, "0123")


def test_a_folder_is_known_by_the_names_and_sizes_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "torch").write_text("2")
    hashes = HashCache(tmp_path / "hashes.json")
    before = image_digest(config_of(tmp_path / "image"), hashes)
    assert before == image_digest(config_of(tmp_path / "image"), hashes)
    (tmp_path / "image" / "torch").write_text("2.1")
    assert image_digest(config_of(tmp_path / "image"), hashes) != before
