"""How each engine starts tritonserver."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.serving.engines import Apptainer, Docker, ServerSpec, Venv, build_argv, choose_engine

IMAGE = "docker://nvcr.io/nvidia/tritonserver:22.08-pyt-python-py3"
UNIX = ServerSpec(Path("/runs/a/model_store"), "unix:/tmp/s/rm.sock", 8001, ("7",), "triton_x_")
LOOPBACK = ServerSpec(Path("/runs/a/model_store"), "127.0.0.1", 40001, (), "triton_x_")
COMMON = [
    "--model-control-mode=none",
    "--disable-auto-complete-config",
    "--grpc-address=unix:/tmp/s/rm.sock",
    "--grpc-port=8001",
    "--allow-http=false",
    "--allow-metrics=false",
    "--backend-config=python,shm-region-prefix-name=triton_x_",
    "--exit-timeout-secs=30",
    "--log-format=ISO8601",
    "--log-verbose=0",
]


def test_apptainer_binds_the_store_read_only_and_the_sockets_folder() -> None:
    assert Apptainer("/cache/image").server_argv(UNIX) == [
        *["apptainer", "exec", "--nv", "--cleanenv", "--no-home"],
        *["--bind", "/runs/a/model_store:/model_store:ro", "--bind", "/tmp/s:/tmp/s", "/cache/image"],
        *["tritonserver", "--model-repository=/model_store", *COMMON],
    ]


def test_singularity_differs_by_name_only_and_binds_no_socket_with_tcp() -> None:
    argv = Apptainer("/cache/image", name="singularity").server_argv(LOOPBACK)
    assert argv[:8] == [
        *["singularity", "exec", "--nv", "--cleanenv", "--no-home"],
        *["--bind", "/runs/a/model_store:/model_store:ro", "/cache/image"],
    ]
    assert "--grpc-address=127.0.0.1" in argv
    assert "--grpc-port=40001" in argv


def test_both_prefixes_carry_the_devices_into_the_container() -> None:
    env = Apptainer("/cache/image").server_env(UNIX, {"HOME": "/home/u", "OMP_NUM_THREADS": "2"})
    for prefix in ("APPTAINERENV", "SINGULARITYENV"):
        assert env[f"{prefix}_CUDA_VISIBLE_DEVICES"] == "7"
        assert env[f"{prefix}_OMP_NUM_THREADS"] == "2"
    assert env["HOME"] == "/home/u"


def test_docker_runs_as_the_user_without_a_network() -> None:
    assert Docker(IMAGE, user="1000:100").server_argv(UNIX) == [
        *["docker", "run", "--rm", "--init", "--ipc=host", "--user=1000:100", "--network=none"],
        *["--gpus", '"device=7"', "--volume", "/runs/a/model_store:/model_store:ro", "--volume", "/tmp/s:/tmp/s"],
        *["nvcr.io/nvidia/tritonserver:22.08-pyt-python-py3", "tritonserver"],
        *["--model-repository=/model_store", *COMMON],
    ]
    assert "--network=host" in Docker(IMAGE).server_argv(LOOPBACK)
    assert "--gpus" not in Docker(IMAGE).server_argv(LOOPBACK)


def test_venv_puts_its_own_python_and_libraries_first_and_no_foreign_packages() -> None:
    engine = Venv(Path("/c/server-1"), (Path("/c/server-1/libs"), Path("/py/lib")))
    argv = engine.server_argv(UNIX)
    assert argv[:3] == [
        "/c/server-1/tritonserver",
        "--backend-directory=/c/server-1/backends",
        "--model-repository=/runs/a/model_store",
    ]
    env = engine.server_env(LOOPBACK, {"PATH": "/bin", "LD_LIBRARY_PATH": "/cuda", "PYTHONPATH": "/x", "A": "b"})
    assert env == {
        "PATH": "/c/server-1/bin:/bin",
        "LD_LIBRARY_PATH": "/c/server-1/libs:/py/lib:/cuda",
        "A": "b",
        "CUDA_VISIBLE_DEVICES": "",
    }


def test_auto_prefers_apptainer_then_singularity_then_docker_then_the_venv() -> None:
    def having(*names: str) -> object:
        return lambda name: f"/usr/bin/{name}" if name in names else None

    assert choose_engine("auto", having("docker", "singularity", "apptainer")) == "apptainer"  # type: ignore[arg-type]
    assert choose_engine("auto", having("docker", "singularity")) == "singularity"  # type: ignore[arg-type]
    assert choose_engine("auto", having("docker")) == "docker"  # type: ignore[arg-type]
    assert choose_engine("auto", having()) == "venv"  # type: ignore[arg-type]
    assert choose_engine("venv", having("docker")) == "venv"  # type: ignore[arg-type]


def test_a_named_engine_must_be_installed() -> None:
    with pytest.raises(UserError, match=r"sandbox\.engine: singularity is not on PATH; use docker or venv"):
        choose_engine("singularity", lambda name: "/usr/bin/docker" if name == "docker" else None)


def test_images_are_fetched_with_the_engines_own_command() -> None:
    target = Path("/cache/image")
    assert build_argv("singularity", IMAGE, target) == ["singularity", "build", "--sandbox", "/cache/image", IMAGE]
    assert build_argv("docker", IMAGE, target) == [
        "docker",
        "pull",
        "nvcr.io/nvidia/tritonserver:22.08-pyt-python-py3",
    ]
