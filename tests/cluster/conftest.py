"""The private Slurm, and one whole chain that ran on it, for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers_cluster import CHAIN_SETTINGS, PROFILE
from helpers_jobs import submit, wait_for
from mini_slurm import MiniSlurm, missing_programs


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniSlurm]:
    """The cluster; each test that asks for it has SLURM_CONF set to it."""
    if missing_programs() and "CI" not in os.environ:
        pytest.skip(f"not installed: {', '.join(missing_programs())}")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "profile.yaml").write_text(yaml.safe_dump(PROFILE))
    cluster = MiniSlurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(autouse=True)
def on_the_login_node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for the test's own time: the cluster lives on while tests of other folders run."""
    if "slurm" in request.fixturenames:
        cluster: MiniSlurm = request.getfixturevalue("slurm")
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def finished(slurm: MiniSlurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole chain, submitted by a process that leaves at once; nothing of ours watches over it."""
    run = tmp_path_factory.mktemp("chain") / "a run"
    profile = slurm.folder / "profile.yaml"
    done = submit(run, "--cluster", profile, "--no-follow", overrides=CHAIN_SETTINGS, env=slurm.environment)
    assert done.status == 0, done.err
    assert len(slurm.command("squeue", "-h").splitlines()) == 7  # the server shares its training's job
    wait_for(lambda: not slurm.command("squeue", "-h").strip(), "the chain to end", 300)
    return run
