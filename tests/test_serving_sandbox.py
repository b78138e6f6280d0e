"""The sandbox cache and what goes into the server's environment."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import procs
from pipeline.config.load import check
from pipeline.containers.steps import run_step
from pipeline.errors import UserError
from pipeline.run import atomic, build_cache
from pipeline.serving import environment, image_checks, sandbox


def write_manifest(folder: Path) -> dict[str, Any]:
    atomic.write_json(folder / "manifest.json", {"made": True})
    return {"made": True}


def always(_: Path) -> bool:
    return True


def test_an_entry_is_built_once(tmp_path: Path) -> None:
    built = [build_cache.cached(tmp_path, "server-1", write_manifest, always) for _ in range(2)]
    assert built == [(tmp_path / "server-1", {"made": True}, True), (tmp_path / "server-1", {"made": True}, False)]
    assert os.listdir(tmp_path) == ["server-1"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("x")
        raise UserError("no index")

    with pytest.raises(UserError, match="no index"):
        build_cache.cached(tmp_path, "server-1", fail, always)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_builder_left_is_removed_and_not_trusted(tmp_path: Path) -> None:
    dead = replace(procs.this_process(), start=1)  # our pid, but of a process that started at boot
    (tmp_path / "server-1.lock").write_text(json.dumps({**asdict(dead), "purpose": "building", "since": 0.0}))
    (tmp_path / "server-1.building").mkdir()
    (tmp_path / "server-1.building" / "half").write_text("x")
    (tmp_path / "server-1").mkdir()  # a folder without a manifest
    folder, _, built = build_cache.cached(tmp_path, "server-1", write_manifest, always)
    assert built
    assert os.listdir(folder) == ["manifest.json"]
    assert os.listdir(tmp_path) == ["server-1"]


def test_a_second_builder_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "server-1.lock"
    atomic.write_json(lock, {**asdict(procs.this_process()), "purpose": "building", "since": 0.0})

    def first_builder_finishes(_: float) -> None:
        write_manifest(tmp_path / "server-1")
        lock.unlink()

    monkeypatch.setattr(build_cache.time, "sleep", first_builder_finishes)
    _, _, built = build_cache.cached(tmp_path, "server-1", write_manifest, always)
    assert not built


def test_a_builder_that_died_on_another_node_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = {**asdict(procs.this_process()), "host": "node7", "purpose": "building", "since": 0.0}
    lock, now = tmp_path / "server-1.lock", 1000.0
    atomic.write_json(lock, elsewhere)
    slept: list[float] = []

    def a_minute_passes(_: float) -> None:
        nonlocal now
        now += 60
        slept.append(now)
        if len(slept) == 2:  # it is alive, and goes on
            os.utime(lock, (now, now))

    monkeypatch.setattr(build_cache.time, "monotonic", lambda: now)
    monkeypatch.setattr(build_cache.time, "sleep", a_minute_passes)
    _, _, built = build_cache.cached(tmp_path, "server-1", write_manifest, always)
    assert built
    assert len(slept) == 2 + 3  # three minutes after it moved last
    assert os.listdir(tmp_path) == ["server-1"]


def test_an_environment_whose_python_is_gone_is_built_again(tmp_path: Path) -> None:
    build_cache.cached(tmp_path, "server-1", write_manifest, always)
    _, _, built = build_cache.cached(tmp_path, "server-1", write_manifest, lambda folder: (folder / "bin").exists())
    assert built


def test_the_server_gets_our_torch_and_transformers_and_an_old_numpy() -> None:
    from importlib.metadata import version

    pins = environment.requirements()
    assert f"torch=={version('torch')}" in pins
    assert f"transformers=={version('transformers')}" in pins
    assert f"tokenizers=={version('tokenizers')}" in pins
    assert "numpy==1.26.4" in pins
    assert "nvidia-pytriton==0.7.0" in pins
    assert all(pin.count("==") == 1 for pin in pins)
    assert len({pin.split("==")[0] for pin in pins}) == len(pins)


def test_what_torch_names_as_extras_of_another_package_is_pinned_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Metadata:
        def __init__(self, version: str, *requires: str) -> None:
            self.version, self.requires = version, list(requires)

    installed = {
        "torch": Metadata("2.13.0", "cuda-toolkit[cublas]==13.0.2", "pytest; extra == 'test'"),
        "transformers": Metadata("5.23.0", "numpy>=2"),
        "cuda-toolkit": Metadata("13.0.2", "nvidia-cublas; extra == 'cublas'", "nvidia-nvjpeg; extra == 'nvjpeg'"),
        "nvidia-cublas": Metadata("13.1.0"),
    }
    monkeypatch.setattr(environment.importlib.metadata, "distribution", installed.__getitem__)
    assert environment.package_pins() == [
        *("cuda-toolkit==13.0.2", "numpy==1.26.4", "nvidia-cublas==13.1.0", "torch==2.13.0", "transformers==5.23.0"),
    ]


def test_the_key_changes_with_any_pin() -> None:
    assert environment.environment_key(["a==1"]) == environment.environment_key(["a==1"])
    assert environment.environment_key(["a==1"]) != environment.environment_key(["a==2"])


def test_a_missing_libpython_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    with pytest.raises(UserError, match=rf"libpython{minor}\.so\.1\.0 not found .* Debian package libpython{minor}"):
        environment.libpython_folder()


def test_a_failing_step_is_one_line_with_the_error_and_the_log(tmp_path: Path) -> None:
    script = "print('Collecting'); print('ERROR: No matching distribution found for torch==9'); raise SystemExit(1)"
    with pytest.raises(UserError, match=r"No matching distribution found for torch==9; set an index \(log: .*log\)$"):
        run_step([sys.executable, "-c", script], os.environ, tmp_path / "log", "set an index")
    assert "Collecting" in (tmp_path / "log").read_text()


def test_engine_none_has_no_sandbox(tmp_path: Path) -> None:
    config = check({"sandbox": {"engine": "none", "cache_dir": str(tmp_path)}})
    with pytest.raises(UserError, match=r'sandbox\.engine: "none" starts no server'):
        sandbox.prepare(config, tmp_path / "log", lambda _: None)


def fake_image(folder: Path, listing: int) -> list[str]:
    """What stands before a command that runs in an image; `listing` is the status of ls in it."""
    script = folder / "inside"
    script.write_text(
        '#!/bin/sh\ncase "$1" in\n'
        "tritonserver) echo usage: --model-repository; exit 1;;\n"
        f"ls) exit {listing};;\n"
        "printenv) echo 2.25.0;;\n"
        "*) exit 3;;\nesac\n"
    )
    script.chmod(0o755)
    return [str(script)]


def test_an_image_for_graphs_needs_the_pytorch_backend_and_no_python(tmp_path: Path) -> None:
    assert image_checks.check_backend(fake_image(tmp_path, 0)) == {
        "python": "none",
        "tritonserver": "2.25.0",
        "closes": False,
    }
    with pytest.raises(UserError, match=r"sandbox\.image: it has no PyTorch backend .*-pyt-python-py3"):
        image_checks.check_backend(fake_image(tmp_path, 2))


def test_graphs_have_no_use_for_the_environment_that_auto_comes_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no container engine
    config = check({"serving": {"flavour": "torchscript"}, "sandbox": {"cache_dir": str(tmp_path)}})
    with pytest.raises(UserError, match=r'serving\.flavour: torchscript .* came to "venv"'):
        sandbox.prepare(config, tmp_path / "log", lambda _: None)
    assert not sandbox.packages_bound(config)


def test_a_sandbox_that_is_gone_says_how_to_get_it_back(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    for values in ({"engine": "venv"}, {"engine": "apptainer", "digest": "sha256:1", "packages": None}):
        opening = sandbox.open_sandbox({**values, "path": gone}, tmp_path / "log")
        with pytest.raises(UserError, match="--force --stage sandbox"), opening:
            pass


def test_the_cache_is_where_the_configuration_or_the_desktop_standard_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert sandbox.cache_dir(check({})) == Path("/cache/hh-pipeline")
    assert sandbox.cache_dir(check({"sandbox": {"cache_dir": "/big/cache"}})) == Path("/big/cache")


@pytest.mark.parametrize(
    "module", ["stages.job", "serving.sandbox", "serving.service", "serving.swap", "serving.client"]
)
def test_jobs_the_sandbox_and_the_service_import_no_torch(module: str) -> None:
    """It would be seven seconds of a slow core, and 300 MB beside the server."""
    script = f"import sys, pipeline.{module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    status, text = procs.capture([sys.executable, "-c", script])
    assert (status, text) == (0, "")
