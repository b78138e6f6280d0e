"""Which container engine is taken, and the command lines that all of them are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.containers.command import Bind, build_argv, choose_engine, docker_argv, exec_argv
from pipeline.errors import UserError


def test_auto_prefers_apptainer_then_singularity_then_docker_then_the_venv() -> None:
    def having(*names: str) -> object:
        return lambda name: f"/usr/bin/{name}" if name in names else None

    assert choose_engine("auto", which=having("docker", "singularity", "apptainer")) == "apptainer"  # type: ignore[arg-type]
    assert choose_engine("auto", which=having("docker", "singularity")) == "singularity"  # type: ignore[arg-type]
    assert choose_engine("auto", which=having("docker")) == "docker"  # type: ignore[arg-type]
    assert choose_engine("auto", which=having()) == "venv"  # type: ignore[arg-type]
    assert choose_engine("venv", which=having("docker")) == "venv"  # type: ignore[arg-type]


def test_a_named_engine_must_be_installed() -> None:
    with pytest.raises(UserError, match=r"sandbox\.engine: singularity is not on PATH; use docker or venv"):
        choose_engine("singularity", which=lambda name: "/usr/bin/docker" if name == "docker" else None)


def test_the_sites_engine_is_taken_though_the_login_node_lacks_it() -> None:
    assert choose_engine("auto", "singularity", which=lambda name: None) == "singularity"
    assert choose_engine("singularity", "singularity", which=lambda name: None) == "singularity"
    assert choose_engine("venv", "singularity", which=lambda name: None) == "venv"


def test_images_are_built_as_a_file_or_as_a_sandbox() -> None:
    source = "docker://nvcr.io/nvidia/tritonserver:22.08-pyt-python-py3"
    assert build_argv("singularity", source, Path("/c/image"), folder=True) == [
        *["singularity", "build", "--sandbox", "--fix-perms", "--disable-cache", "/c/image", source],
    ]
    assert build_argv("apptainer", source, Path("/c/image.sif"), folder=False) == [
        *["apptainer", "build", "--disable-cache", "/c/image.sif", source],
    ]


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("/runs/a", ["--bind", "/runs/a:/in"]),
        ("/runs/a 0", ["--mount", "type=bind,source=/runs/a 0,destination=/in"]),
        ("/runs/a:b", ["--mount", "type=bind,source=/runs/a:b,destination=/in"]),
        ("/runs/a,b", ["--mount", 'type=bind,"source=/runs/a,b",destination=/in']),
        ('/runs/a"=0"', ["--mount", 'type=bind,"source=/runs/a""=0""",destination=/in']),
    ],
)
def test_a_path_with_separators_in_it_is_bound_whole(source: str, arguments: list[str]) -> None:
    argv = exec_argv("apptainer", "image.sif", [Bind(Path(source), "/in", writable=True)], False, own_environment=False)
    assert argv == ["apptainer", "exec", *arguments, "image.sif"]


def test_docker_takes_the_same_names() -> None:
    argv = docker_argv("image", [Bind(Path("/runs/a,b"), "/in")], (), network=False, user="1:1")
    assert argv[-2] == 'type=bind,"source=/runs/a,b",target=/in,readonly'
