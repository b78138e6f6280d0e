"""The private Slurm, and one whole chain that ran on it, for all tests of this folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import registry
import triton_image
import yaml
from helpers_cluster import CHAIN_SETTINGS, PROFILE
from helpers_jobs import end_followers, submit, wait_for
from mini_slurm import MiniSlurm, missing_programs
from ordinary_user import OrdinaryUser, missing_user, remove
from registry import Registry

from pipeline.run.build_cache import exclusive


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
def on_the_login_node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only for the test's own time: the cluster lives on while tests of other folders run. What a test that failed left
    in the queue is not the next one's."""
    if "slurm" not in request.fixturenames:
        yield
        return
    cluster: MiniSlurm = request.getfixturevalue("slurm")
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    others = cluster.job_ids()  # of a whole module, as a rule
    yield
    end_followers()
    cluster.clear(others)


@pytest.fixture(scope="session")
def of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this session, the same one for all workers of pytest-xdist."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def finished(slurm: MiniSlurm, of_all_workers: Path) -> Path:
    """The whole chain, submitted by a process that leaves at once; nothing of ours watches over it.

    Made by the worker that asks first. Tests look at it, or change a copy of it.
    """
    run = of_all_workers / "chain" / "a run"
    with exclusive(of_all_workers / "chain.lock", "the whole chain"):
        if not (run.parent / "whole").exists():
            assert not run.exists(), "it failed already"
            _run_chain(slurm, run)
            (run.parent / "whole").touch()
    return run


def _run_chain(slurm: MiniSlurm, run: Path) -> None:
    profile = slurm.folder / "profile.yaml"
    others = slurm.job_ids()
    done = submit(run, "--cluster", profile, "--no-follow", overrides=CHAIN_SETTINGS, env=slurm.environment)
    assert done.status == 0, done.err
    jobs = set(slurm.job_ids()).difference(others)
    assert len(jobs) == 7  # the server shares its training's job
    wait_for(lambda: not jobs.intersection(slurm.job_ids()), "the chain to end", 600)


@pytest.fixture(scope="session")
def user() -> OrdinaryUser:
    """Who runs Apptainer; the test is skipped where that cannot be."""
    missing = [name for name in ("apptainer", "unsquashfs", "squashfuse", "newuidmap") if shutil.which(name) is None]
    reason = f"not installed: {', '.join(missing)}; see .ci/apptainer" if missing else missing_user()
    if reason and "CI" not in os.environ:
        pytest.skip(reason)
    assert not reason, reason
    return OrdinaryUser.find()


@pytest.fixture(scope="session")
def layout() -> Path:
    """The OCI layout of the small tritonserver image."""
    _need(triton_image.missing_programs())
    return triton_image.image_layout()


@pytest.fixture(scope="session")
def public_registry(layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry on loopback that holds it."""
    _need(registry.missing_programs())
    server = Registry(tmp_path_factory.mktemp("registry"))
    try:
        server.start()
        server.push(layout, triton_image.NAME)
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def oci_archive(layout: Path, user: OrdinaryUser, shared: Path) -> Path:
    """The image as one file, as `skopeo copy` writes it for a machine that is offline."""
    return _archived(layout, "oci-archive", user, shared)


@pytest.fixture(scope="session")
def docker_archive(layout: Path, user: OrdinaryUser, shared: Path) -> Path:
    """The image as `docker save` writes it."""
    return _archived(layout, "docker-archive", user, shared)


@pytest.fixture(scope="session")
def shared(user: OrdinaryUser) -> Iterator[Path]:
    """A folder of the user's, for the whole session; it lies where no container sees it by itself."""
    folder = user.folder("hh-tests")
    yield folder
    remove(folder)


def _archived(layout: Path, kind: str, user: OrdinaryUser, folder: Path) -> Path:
    path = triton_image.archive(layout, kind, folder / f"{kind}.tar")
    user.own(path)
    return path


def _need(programs: list[str]) -> None:
    if programs and "CI" not in os.environ:
        pytest.skip(f"not installed: {', '.join(programs)}")
    assert not programs, f"not installed: {', '.join(programs)}"
