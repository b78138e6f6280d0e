"""How each engine starts tritonserver."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from pipeline import procs
from pipeline.run.owner import mark
from pipeline.serving.engines import Apptainer, Docker, ServerSpec, Venv

IMAGE = "docker://nvcr.io/nvidia/tritonserver:22.08-pyt-python-py3"
UNIX = ServerSpec(Path("/runs/a/model_store"), "unix:/tmp/s/rm.sock", 8001, ("7",), "triton_x_")
LOOPBACK = ServerSpec(Path("/runs/a/model_store"), "127.0.0.1", 40001, (), "triton_x_")
PRIVATELY = ["sh", "-c", 'umask 077; exec "$@"', "sh"]
CLOSED = "--grpc-restricted-protocol=shared-memory,model-repository,trace,logging:Closed=nobody"
GUARD = [sys.executable, "-m", "pipeline.containers.guard"]
SECRETS = {"HF_TOKEN": "secret", "WANDB_API_KEY": "secret"}
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
    assert Apptainer("/cache/image.sif", packages=Path("/cache/packages/site")).server_argv(UNIX) == [
        *GUARD,
        *["apptainer", "exec", "--nv", "--cleanenv", "--no-home", "--pwd", "/"],
        *["--bind", "/runs/a/model_store:/model_store:ro", "--bind", "/tmp/s:/tmp/s"],
        *["--bind", "/cache/packages/site:/hh-packages:ro", "/cache/image.sif"],
        *[*PRIVATELY, "tritonserver", "--model-repository=/model_store", *COMMON],
    ]


def test_a_server_that_can_close_parts_of_its_service_does_so() -> None:
    assert Venv(Path("/c/server-1"), ()).server_argv(UNIX)[-1] == CLOSED
    for engine in (Apptainer("/cache/image.sif", closes=True), Docker(IMAGE, closes=True)):
        assert engine.server_argv(UNIX)[-1] == CLOSED
    for old in (Apptainer("/cache/image.sif"), Docker(IMAGE)):  # 22.08 does not know the option, and would not start
        assert CLOSED not in old.server_argv(UNIX)


def test_singularity_differs_by_name_only_and_binds_no_socket_with_tcp() -> None:
    argv = Apptainer("/cache/image", name="singularity").server_argv(LOOPBACK)
    assert argv[:12] == [
        *GUARD,
        *["singularity", "exec", "--cleanenv", "--no-home", "--pwd", "/"],  # without GPUs no --nv, which would complain
        *["--bind", "/runs/a/model_store:/model_store:ro", "/cache/image"],
    ]
    assert "--grpc-address=127.0.0.1" in argv
    assert "--grpc-port=40001" in argv


def test_a_container_finds_its_certificates_where_they_are_bound() -> None:
    spec = replace(LOOPBACK, tls=Path("/runs/a, b/services/tls"))
    argv = Apptainer("/cache/image").server_argv(spec)
    assert argv[argv.index("--mount") + 1] == 'type=bind,"source=/runs/a, b/services/tls",destination=/hh-tls,ro'
    assert "--grpc-server-key=/hh-tls/server.key" in argv
    venv = Venv(Path("/c/server-1"), ()).server_argv(spec)
    assert "--grpc-server-key=/runs/a, b/services/tls/server.key" in venv


def test_both_prefixes_carry_devices_packages_and_marks_into_the_container() -> None:
    outside = {"HOME": "/home/u", "OMP_NUM_THREADS": "2", "HH_PIPELINE_RUN": "/runs/a", "APPTAINERENV_PATH": "/x"}
    env = Apptainer("/cache/image", packages=Path("/p")).server_env(UNIX, outside)
    inside = {"CUDA_VISIBLE_DEVICES": "7", "OMP_NUM_THREADS": "2", "HH_PIPELINE_PACKAGES": "/hh-packages"}
    for prefix in ("APPTAINERENV", "SINGULARITYENV"):
        for name, value in {**inside, "HH_PIPELINE_RUN": "/runs/a"}.items():
            assert env.pop(f"{prefix}_{name}") == value
    assert env == {"HOME": "/home/u", "OMP_NUM_THREADS": "2", "HH_PIPELINE_RUN": "/runs/a"}


def test_docker_runs_as_the_user_without_a_network() -> None:
    argv = Docker(IMAGE, user="1000:100", packages=Path("/p")).server_argv(UNIX)
    name = argv.pop(argv.index(f"--label=hh-pipeline.user={os.getuid()}") - 1)
    argv.remove(f"--label=hh-pipeline.user={os.getuid()}")
    assert name == f"--name={mark(procs.this_process())}x"
    assert argv == [
        *[*GUARD, "docker", "run", "--rm", "--init", "--ipc=host", "--user=1000:100", "--network=none"],
        *["--gpus", '"device=7"', "--mount", "type=bind,source=/runs/a/model_store,target=/model_store,readonly"],
        *["--mount", "type=bind,source=/tmp/s,target=/tmp/s"],
        *["--mount", "type=bind,source=/p,target=/hh-packages,readonly", "--env=HH_PIPELINE_PACKAGES=/hh-packages"],
        *["nvcr.io/nvidia/tritonserver:22.08-pyt-python-py3", *PRIVATELY, "tritonserver"],
        *["--model-repository=/model_store", *COMMON],
    ]
    assert "--network=host" in Docker(IMAGE).server_argv(LOOPBACK)
    assert "--gpus" not in Docker(IMAGE).server_argv(LOOPBACK)


def test_venv_puts_its_own_python_and_libraries_first_and_no_foreign_packages() -> None:
    engine = Venv(Path("/c/server-1"), (Path("/c/server-1/libs"), Path("/py/lib")))
    argv = engine.server_argv(UNIX)
    assert argv[: len(PRIVATELY) + 3] == [
        *PRIVATELY,
        "/c/server-1/tritonserver",
        "--backend-directory=/c/server-1/backends",
        "--model-repository=/runs/a/model_store",
    ]
    env = engine.server_env(
        LOOPBACK, {"PATH": "/bin", "LD_LIBRARY_PATH": "/cuda", "PYTHONPATH": "/x", "A": "b", **SECRETS}
    )
    assert env == {
        "PATH": "/c/server-1/bin:/bin",
        "LD_LIBRARY_PATH": "/c/server-1/libs:/py/lib:/cuda",
        "A": "b",
        "CUDA_VISIBLE_DEVICES": "",
    }
