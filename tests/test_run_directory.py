"""What other processes read is never half-written, and a lock has one holder."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from pipeline import procs
from pipeline.errors import UserError
from pipeline.run import atomic, events, provenance
from pipeline.run.directory import Artifact, Outputs, RunDir
from pipeline.run.hashing import HashCache, hash_tree, sha256_file, tree_bytes
from pipeline.run.lock import lock


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    atomic.write_json(path, {"n": 0})
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            seen.add(json.loads(path.read_text())["n"])

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(1, 60):
        atomic.write_json(path, {"n": n, "padding": "x" * 200_000})
    stop.set()
    reader.join()
    assert seen <= set(range(60))
    assert os.listdir(tmp_path) == ["value.json"]


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic.write_text(path, "old")
    with pytest.raises(RuntimeError), atomic.atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError("interrupted")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"/dev/full: cannot write: the disk is full"):
        atomic.append_line(Path("/dev/full"), "x")


def test_a_folder_that_cannot_be_written_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"^/sys/hh-pipeline/file: cannot write: .*; choose"):
        atomic.write_text(Path("/sys/hh-pipeline/file"), "x")


def test_outputs_return_as_they_were_written(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.outputs("sft") is None
    outputs = Outputs("sft", "f" * 64, 2, {"model": Artifact("models/x", "a" * 64, 3)}, {"loss": 1.5}, {"version": 1})
    run.write_outputs(outputs)
    assert run.outputs("sft") == outputs
    with pytest.raises(UserError, match="artifact of stage sft is gone"):
        run.artifact("sft", "model")
    with pytest.raises(UserError, match="stage train is not done"):
        run.artifact("train", "policy")


def test_damaged_outputs_are_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    atomic.write_text(run.stage("sft") / "outputs.json", "{")
    with pytest.raises(UserError, match=r"outputs.json: not valid JSON"):
        run.outputs("sft")
    atomic.write_json(run.stage("sft") / "outputs.json", {"artifacts": {}, "new_field": 1})
    with pytest.raises(UserError, match=r"outputs.json: not of this version"):
        run.outputs("sft")


def test_a_foreign_folder_or_another_layout_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    provenance.check_layout(run)  # empty: fine
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match="not empty and not a run directory"):
        provenance.check_layout(run)
    atomic.write_json(run.provenance, {"layout_version": 99, "version": "9.9"})
    with pytest.raises(UserError, match=r"made by version 9\.9 of this project"):
        provenance.check_layout(run)


def test_a_symlink_is_replaced_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        atomic.replace_symlink(tmp_path / "links" / "current", tmp_path / name)
        assert (tmp_path / "links" / "current").resolve() == (tmp_path / name).resolve()
    assert os.readlink(tmp_path / "links" / "current") == "../two"  # relative: the run directory may move


def test_folder_hashes_follow_names_and_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first, size = hash_tree(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    second, _ = hash_tree(tmp_path)
    (tmp_path / "b").write_text("2")
    third, _ = hash_tree(tmp_path)
    assert len({first, second, third}) == 3
    assert size == 1
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "model.pyc").write_text("compiled by whoever imported it")
    assert hash_tree(tmp_path) == (third, 1)
    assert tree_bytes(tmp_path) == 1


def test_the_hash_cache_reads_a_file_again_only_when_it_was_touched(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "data"
    path.write_text("one")
    cache = HashCache(tmp_path / "cache.json")
    first = cache.sha256(path)
    cache.save()
    reads: list[Path] = []
    monkeypatch.setattr("pipeline.run.hashing.sha256_file", lambda p: reads.append(p) or sha256_file(p))
    again = HashCache(tmp_path / "cache.json")
    assert again.sha256(path) == first
    assert reads == []
    path.write_text("two!")
    assert again.sha256(path) != first
    assert reads == [path]


def test_events_survive_a_cut_last_line(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    events.record(run, "one", n=1)
    with run.events.open("a") as file:
        file.write('{"event": "tw')
    assert [event["event"] for event in events.read(run)] == ["one"]


def test_the_second_of_two_submitters_is_told_about_the_first(tmp_path: Path) -> None:
    path = tmp_path / "control" / "submit.lock"
    with lock(path, "submitting"), pytest.raises(UserError) as caught, lock(path, "submitting"):
        pass
    assert f"process {os.getpid()} on" in str(caught.value)
    assert not path.exists()


def test_a_dead_submitters_lock_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "submit.lock"

    def hold_and_die() -> None:
        with lock(path, "submitting"):
            os._exit(9)

    process = multiprocessing.get_context("fork").Process(target=hold_and_die)
    process.start()
    process.join()
    assert path.exists()
    with lock(path, "submitting"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def _try_lock(path: Path, results) -> None:
    try:
        with lock(path, "racing"):
            results.put(("in", time.monotonic()))
            time.sleep(0.2)
            results.put(("out", time.monotonic()))
    except UserError:
        results.put(("refused", 0.0))


def test_of_many_racing_for_a_stale_lock_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "submit.lock"
    stale = {**procs.this_process().__dict__, "start": 1, "purpose": "x", "since": 0.0}
    path.write_text(json.dumps(stale))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    racers = [context.Process(target=_try_lock, args=(path, results)) for _ in range(6)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    outcomes = sorted((results.get() for _ in range(results.qsize())), key=lambda each: each[1])
    held = [name for name, _ in outcomes if name != "refused"]
    assert held
    assert held == ["in", "out"] * (len(held) // 2)  # never two inside at once
