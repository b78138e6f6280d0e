"""Where a server is: its ports, its socket's folder, and its regions of shared memory."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_serving import serving_config

from pipeline import procs
from pipeline.errors import UserError
from pipeline.run import owner
from pipeline.serving.server import TritonServer, free_port, make_spec
from pipeline.serving.shared_memory import region_prefix, sweep


def test_a_taken_port_is_noticed_before_anything_starts() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"serving\.grpc_port: {port} cannot be bound"):
            make_spec(serving_config(bind="loopback", grpc_port=port).serving, Path("/store"), ["7"], Path("/tls"))
    assert free_port() > 0


def test_the_socket_is_in_a_folder_that_only_we_can_enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 30)))
    Path(tempfile.gettempdir()).mkdir()
    spec = make_spec(serving_config(bind="unix").serving, Path("/store"), ["7"])
    folder = spec.socket_folder
    assert folder is not None
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(f"{folder}/rm.sock:8001") < 108
    assert list(Path(tempfile.gettempdir()).iterdir()) == []
    assert not owner.is_orphaned(folder.name)
    folder.rmdir()


def test_the_socket_folder_of_a_supervisor_that_was_killed_goes_with_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    here = procs.this_process()
    killed = tmp_path / f"hh-triton-{owner.mark(replace(here, start=here.start + 1))}x"  # its pid is another's now
    killed.mkdir()
    (killed / "rm.sock:8001").touch()
    spec = make_spec(serving_config(bind="unix").serving, tmp_path, [])
    assert spec.socket_folder is not None

    class Refusing:
        """Comes to no start."""

        def sweep(self) -> None:
            raise UserError("no further")

    server = TritonServer(Refusing(), spec, "rm", tmp_path / "log", {})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no further"):
        server.start()
    assert not killed.exists() and spec.socket_folder.exists()
    server.remove_socket_folder()


def test_only_own_regions_and_those_of_dead_supervisors_are_swept(tmp_path: Path) -> None:
    import mmap

    here, store = procs.this_process(), Path("/a/store")
    alive, own = region_prefix(here, store), region_prefix(here, store)
    reused = region_prefix(replace(here, start=here.start + 1), store)  # the pid now belongs to another process
    gone = region_prefix(replace(here, pid=2**22 + 1), store)  # above the kernel's largest pid
    elsewhere = gone.replace(gone.split("_")[2], "1")  # of a container whose processes cannot be seen
    kept = [f"{own}mapped", f"{alive}1", f"{elsewhere}1", "triton_python_backend_shm_region_1", "else"]
    for name in (*kept, f"{own}1", f"{reused}1", f"{gone}1"):
        (tmp_path / name).write_bytes(b"x" * 4096)
    with (tmp_path / f"{own}mapped").open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert sweep(own, tmp_path) == sorted([f"{own}1", f"{reused}1", f"{gone}1"])
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
