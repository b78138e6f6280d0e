"""What killed jobs leave on a node is removed by the next one there, and nothing that somebody may still use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_jobs import fake_slurm, wait_for

from pipeline import procs
from pipeline.containers import docker, images
from pipeline.containers.command import guarded
from pipeline.run import owner
from pipeline.serving import sandbox
from pipeline.serving.engines import Docker, ServerSpec

HERE = procs.this_process()
KILLED = replace(HERE, pid=2**22 + 1)  # above the kernel's largest pid
REUSED = replace(HERE, start=HERE.start + 1)  # its pid is another process's now
ELSEWHERE = replace(KILLED, host="another-node")
DAEMON = """
case "$1" in
    run) echo $$ > {folder}/pid; exec sleep 600;;
    ps) cat {folder}/containers;;
    rm) echo "Error: No such container: $3" >&2; exit 1;;
esac
"""
STARTER = "import sys, time; from pipeline import procs; procs.spawn(sys.argv[1:]); time.sleep(600)"


def test_folders_of_killed_jobs_of_this_node_are_swept_and_no_others(tmp_path: Path) -> None:
    names = {who: f"hh-image-{owner.mark(who)}{turn}" for turn, who in enumerate((HERE, KILLED, REUSED, ELSEWHERE))}
    for name in [*names.values(), "hh-image-of-somebody", "other-" + owner.mark(KILLED)]:
        (tmp_path / name / "image" / "usr").mkdir(parents=True)
        (tmp_path / name / "image" / "usr").chmod(0o500)  # as some images have it
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / f"hh-image-{owner.mark(KILLED)}link").symlink_to(outside)
    assert owner.sweep_folders(tmp_path, "hh-image-") == sorted([names[KILLED], names[REUSED]])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        *(names[HERE], names[ELSEWHERE], "hh-image-of-somebody"),
        *("other-" + owner.mark(KILLED), f"hh-image-{owner.mark(KILLED)}link", "outside"),
    }


def test_folders_of_another_user_and_of_another_container_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"hh-image-{owner.mark(KILLED)}0").mkdir()
    monkeypatch.setattr(owner.os, "getuid", lambda: 12345)
    assert owner.sweep_folders(tmp_path, "hh-image-") == []
    monkeypatch.undo()
    monkeypatch.setattr(owner, "pid_namespace", lambda: "1")
    assert owner.sweep_folders(tmp_path, "hh-image-") == []


def test_unpacking_an_image_sweeps_what_a_killed_server_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / f"hh-image-{owner.mark(KILLED)}0"
    left.mkdir()
    (tmp_path / "image.sif").touch()
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(images, "unpack", lambda image, target, log, tick: replace(image, file=str(target)))
    values = {"engine": "apptainer", "path": str(tmp_path / "image.sif"), "digest": "", "unpack_on_node": True}
    with sandbox.open_sandbox(values, tmp_path / "log"):
        (unpacked,) = tmp_path.glob("hh-image-*")
        assert unpacked != left
        assert owner.sweep_folders(tmp_path, "hh-image-") == []  # another one that starts here now
    assert list(tmp_path.glob("hh-image-*")) == []


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A docker whose daemon knows some containers."""
    names = [f"{owner.mark(who)}0" for who in (HERE, KILLED, ELSEWHERE)]
    (tmp_path / "containers").write_text("\n".join([*names, "postgres"]) + "\n")
    return fake_slurm(monkeypatch, tmp_path, docker=DAEMON.format(folder=tmp_path))


def test_containers_of_killed_servers_are_removed_before_a_start(calls: Path) -> None:
    Docker("image").sweep()
    listed = f"docker ps --all --filter=label=hh-pipeline.user={os.getuid()} --format={{{{.Names}}}}"
    assert calls.read_text().splitlines() == [listed, f"docker rm --force {owner.mark(KILLED)}0"]


def test_a_server_that_was_stopped_leaves_no_container(calls: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = ServerSpec(Path("/store"), "127.0.0.1", 1, shm_prefix="triton_hh_1_2_3_abcd1234_")
    (name,) = (word for word in Docker("image").server_argv(spec) if word.startswith("--name="))
    Docker("image").clean_up(spec)
    assert calls.read_text() == f"docker rm --force {name.removeprefix('--name=')}\n"
    assert name.endswith("_abcd1234")
    assert caplog.text == ""  # it was gone already, as is right


@pytest.mark.parametrize("victim", ["starter", "docker"])
def test_a_killed_starter_or_a_killed_docker_takes_the_container_along(
    calls: Path, tmp_path: Path, victim: str
) -> None:
    argv = guarded(["docker", "run", *docker.identity("a-name"), "image", "tritonserver"])
    starter = subprocess.Popen([sys.executable, "-c", STARTER, *argv])
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "docker to run", 30)
    os.kill(starter.pid if victim == "starter" else int((tmp_path / "pid").read_text()), signal.SIGKILL)
    wait_for(lambda: "docker rm --force a-name" in calls.read_text(), "its container to be removed", 30)
    starter.kill()
    starter.wait()


def test_a_daemon_that_does_not_answer_is_logged_and_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_slurm(monkeypatch, tmp_path, docker="echo Cannot connect to the Docker daemon; exit 1")
    started = time.monotonic()
    assert docker.sweep() == []
    assert "docker ps --all" in caplog.text and "Cannot connect to the Docker daemon" in caplog.text
    assert time.monotonic() - started < 30
