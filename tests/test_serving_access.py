"""Who may enter and change what a server reads, whatever the umask and whoever shares the run directory."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_jobs import ROOT

from pipeline.errors import UserError
from pipeline.run import endpoint
from pipeline.run.directory import RunDir
from pipeline.serving import access, tls
from pipeline.serving.model_store import place_model


@pytest.fixture(params=[0o000, 0o002, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def new_store(folder: Path) -> Path:
    """A store's shape; its weights have a second name outside."""
    version = folder / "store" / "reward-model" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text("code")
    (folder / "weights").write_text("weights")
    os.link(folder / "weights", version / "weights")
    return folder / "store"


def test_a_sealed_store_is_its_owners_to_enter_and_nobodys_to_write(tmp_path: Path, umask: int) -> None:
    store = new_store(tmp_path)
    before = mode(tmp_path / "weights")
    access.seal(store)
    assert mode(store) == 0o700
    assert mode(store / "reward-model/1") & 0o022 == 0
    assert mode(store / "reward-model/1/model.py") & 0o222 == 0
    assert mode(tmp_path / "weights") == before  # the source's mode is not ours to change
    shutil.rmtree(store)  # its owner may still remove it


@pytest.mark.parametrize("which", ["store", "store/reward-model/1", "store/reward-model/1/model.py", "."])
def test_what_every_user_may_change_is_not_served(tmp_path: Path, which: str) -> None:
    store = new_store(tmp_path / "run")
    access.check(store)
    open_to_all = tmp_path / "run" / which
    open_to_all.chmod(0o777)
    with pytest.raises(UserError, match=rf"^{open_to_all}: every user may write to it.*chmod o-w"):
        access.check(store)
    open_to_all.chmod(0o775)  # a group that shares the run directory is trusted with it
    access.check(store)


def test_what_is_inside_a_closed_store_is_out_of_reach(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    (store / "reward-model").chmod(0o777)
    store.chmod(0o700)
    access.check(store)


def test_a_folder_like_tmp_is_no_danger(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    tmp_path.chmod(0o1777)
    access.check(store)


def test_weights_that_every_user_may_write_are_copied_and_not_linked(tmp_path: Path) -> None:
    from helpers_serving import save_reward_model

    source = save_reward_model(tmp_path / "rm")
    weights = source / "model.safetensors"
    for writable, links in ((0o600, 2), (0o666, 1)):
        weights.chmod(writable)
        place_model(source, tmp_path / oct(writable), "float32")
        assert (tmp_path / oct(writable) / "model.safetensors").stat().st_nlink == links


def test_services_and_what_is_in_it_are_private_under_any_umask(tmp_path: Path, umask: int) -> None:
    root = tmp_path / "run"
    root.mkdir(mode=0o775)
    root.chmod(0o2775)  # shared by a group
    run = RunDir(root)
    folder = tls.ensure(run.endpoint.parent / "tls")
    endpoint.publish(run, endpoint.Endpoint("127.0.0.1:1/m", "m", "1", "d", "1", "h", 1, tls=str(folder)))
    endpoint.expect(run)
    services = root / "services"
    assert mode(services) == mode(folder) == 0o700
    files = {path.name: mode(path) for path in services.rglob("*") if path.is_file()}
    keys = ["ca.pem", "client.key", "client.pem", "server.key", "server.pem"]
    assert {name: files[name] for name in (*keys, "triton.json", "triton.env")} == dict.fromkeys(
        (*keys, "triton.json", "triton.env"), 0o600
    )


def test_a_services_folder_that_somebody_opened_is_closed_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.endpoint.parent.mkdir(mode=0o755)
    endpoint.expect(run)
    assert mode(run.endpoint.parent) == 0o700


def test_keys_that_others_could_read_or_that_end_soon_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tls.ensure(tmp_path / "services" / "tls")
    first = (folder / "client.key").read_bytes()
    assert (tls.ensure(folder) / "client.key").read_bytes() == first
    (folder / "client.key").chmod(0o644)  # as chmod -R go+rX on the run directory does
    second = (tls.ensure(folder) / "client.key").read_bytes()
    assert second != first
    assert mode(folder / "client.key") == 0o600
    assert "client.key: other users could read it" in caplog.text
    later = tls._now() + datetime.timedelta(days=330)
    monkeypatch.setattr(tls, "_now", lambda: later)
    assert (tls.ensure(folder) / "client.key").read_bytes() != second


def test_a_command_makes_nothing_that_every_user_may_write(tmp_path: Path) -> None:
    code = "from pathlib import Path; from pipeline.errors import run_command; run_command(lambda: Path('f').touch())"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, umask=0)
    assert mode(tmp_path / "f") == 0o664
