"""A real Apptainer, used by an ordinary user: what the pipeline's containers rest on."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_jobs import wait_for
from mini_slurm import MiniSlurm
from ordinary_user import OrdinaryUser, remove
from registry import Registry
from triton_image import NAME

pytestmark = pytest.mark.apptainer


@pytest.fixture(scope="module")
def sandbox(public_registry: Registry, user: OrdinaryUser, shared: Path) -> Path:
    """Built by the user out of the registry, in a folder with a space in its name."""
    folder = shared / "an image"
    source = f"docker://{public_registry.address}/{NAME}"
    env = user.environment(APPTAINER_NOHTTPS="true", APPTAINER_DISABLE_CACHE="true")
    done = user.run("apptainer", "build", "--sandbox", folder, source, env=env)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_user_builds_a_sandbox_from_a_registry_and_runs_tritonserver_in_it(sandbox: Path, user: OrdinaryUser) -> None:
    assert sandbox.stat().st_uid == user.uid
    shown = user.run("apptainer", "exec", "--cleanenv", "--no-home", sandbox, "tritonserver", "--help")
    assert "--model-repository" in shown.stderr
    stub = "/opt/tritonserver/backends/python/triton_python_backend_stub"
    libraries = user.run("apptainer", "exec", sandbox, "ldd", stub).stdout
    assert "libpython3.11.so.1.0 => /" in libraries
    assert "not found" not in libraries
    numpy = user.run("apptainer", "exec", sandbox, "python3", "-c", "import numpy; print(numpy.__version__)")
    assert numpy.stdout.startswith("1."), numpy.stderr


@pytest.mark.parametrize(("number", "left"), [(signal.SIGTERM, "ended by itself"), (signal.SIGKILL, "")])
def test_a_signal_to_apptainer_reaches_the_program_and_a_kill_takes_it_along(
    sandbox: Path, user: OrdinaryUser, shared: Path, number: signal.Signals, left: str
) -> None:
    said = shared / f"said {number.name}"
    said.mkdir()
    user.own(said)
    program = 'trap \'echo ended by itself >"$0/end"; exit 3\' TERM; echo $$ >"$0/pid"; while :; do sleep 0.1; done'
    argv = ("apptainer", "exec", "--no-home", "--bind", said, sandbox, "bash", "-c", program, said)
    started = user.start(*argv, log=said / "log")
    wait_for(lambda: (said / "pid").exists() and (said / "pid").read_text(), "the program", 60)
    inside = int((said / "pid").read_text())  # the same outside: exec makes no namespace of processes
    os.kill(started.pid, number)
    assert started.wait(60) == (3 if number == signal.SIGTERM else -number)
    wait_for(lambda: not Path(f"/proc/{inside}").exists(), "the program to end", 60)
    assert ((said / "end").read_text().strip() if (said / "end").exists() else "") == left


@pytest.mark.slurm
def test_a_users_own_slurm_runs_its_jobs_with_this_interpreter_and_apptainer(
    cluster_of_the_user: MiniSlurm, sandbox: Path, user: OrdinaryUser
) -> None:
    folder = cluster_of_the_user.folder
    look = "import os, torch; print(os.getuid(), os.environ['CUDA_VISIBLE_DEVICES'])"
    version = f"apptainer exec '{sandbox}' bash -c 'echo $TRITON_SERVER_VERSION'"
    (folder / "job.sh").write_text(f'#!/bin/bash\n"{sys.executable}" -c "{look}"\n{version}\n')
    output = folder / "job.out"
    cluster_of_the_user.command("sbatch", "--gres=gpu:8", f"--output={output}", str(folder / "job.sh"))
    wait_for(cluster_of_the_user.empty, "the job to end")
    assert output.read_text().splitlines() == [f"{user.uid} 0,1,2,3,4,5,6,7", "2.51.0"]


@pytest.fixture
def cluster_of_the_user(user: OrdinaryUser) -> Iterator[MiniSlurm]:
    """All of it run by the user: the daemons, and so the jobs."""
    folder = user.folder("slurm")
    cluster = MiniSlurm(folder, user)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        remove(folder)
