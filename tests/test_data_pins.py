"""What prefetch takes from the hub is pinned to a commit, whole, and the same for all that follows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers_hub import StandInHub, standing_in
from helpers_jobs import TINY, submit

from pipeline.config.load import dump, load_preset, read_config, resolve
from pipeline.errors import UserError
from pipeline.run import sources
from pipeline.run.directory import Artifact, Outputs, RunDir
from pipeline.run.hashing import HashCache
from pipeline.stages.base import Context
from pipeline.stages.plan import basis, fingerprint, make_plan
from pipeline.stages.registry import REGISTRY

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = b"w" * 200_000
MODEL = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"a pickle, which is not wanted",
    "tokenizer.json": b"{}",
}
REWARD = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    ).encode(),
    "one.safetensors": b"1" * 10,
    "two.safetensors": b"2" * 20,
}


def rows(answer: str) -> bytes:
    row = {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": f" {answer}", "rejected": " no"}
    return (json.dumps(row) + "\n").encode()


def pairs(answer: str) -> dict[str, bytes]:
    return {"train.jsonl": rows(answer), "test.jsonl": rows(answer)}


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with standing_in() as hub:
        yield hub


def run_of(folder: Path, *overrides: str) -> RunDir:
    folder.mkdir(parents=True, exist_ok=True)
    settings = ("model.path=lab/model", "data.demo.train=8", "data.demo.test=4", *overrides)
    (folder / "config.yaml").write_text(dump(resolve(load_preset("demo"), settings)))
    return RunDir(folder)


def prefetch(run: RunDir, hub: StandInHub, **environment: str) -> tuple[int, str]:
    """One attempt at the stage's work; a finished one is recorded as the runner does. Status and last line."""
    out = run.root / "out"
    shutil.rmtree(out, ignore_errors=True)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HTTP", "http"))}
    home = {"HF_HOME": str(run.root.parent / "cache"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
    script = "import time; time.sleep = lambda seconds: None\n"  # the hub's client pauses between its tries
    script += "from pipeline.errors import run_command; from pipeline.data.prefetch import main; run_command(main)"
    done = subprocess.run(
        [sys.executable, "-c", script, "--run", str(run.root), "--out", str(out)],
        env={**inherited, **home, **environment},
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    if done.returncode == 0:
        values = json.loads((out / "result.json").read_text())["values"]
        known = basis(REGISTRY["prefetch"], context_of(run))
        run.write_outputs(Outputs("prefetch", fingerprint(known), 1, values=values, basis=known))
    return done.returncode, done.stderr.splitlines()[-1]


def context_of(run: RunDir) -> Context:
    return Context(run, read_config(run.root), HashCache(run.root / "hashes.json"))


def commits(run: RunDir) -> dict[str, str]:
    return {key: pin.commit for key, pin in sources.pins(run).items()}


def test_a_branch_that_moves_on_changes_nothing_until_it_is_asked_for(hub: StandInHub, tmp_path: Path) -> None:
    first = {name: hub.commit(f"models/lab/{name}", MODEL) for name in ("model", "tokenizer")}
    first["reward"], first["pairs"] = (
        hub.commit("models/lab/reward", REWARD),
        hub.commit("datasets/lab/pairs", pairs("a")),
    )
    run = run_of(
        tmp_path / "run",
        *("data.source=lab/pairs", "model.tokenizer_path=lab/tokenizer", "reward_model.checkpoint=lab/reward"),
    )
    assert prefetch(run, hub)[0] == 0
    taken = {
        key: first[name]
        for key, name in zip(
            ("model", "tokenizer", "reward_model", "data"), ("model", "tokenizer", "reward", "pairs"), strict=True
        )
    }
    assert commits(run) == taken
    assert sources.pins(run)["model"].files == {
        name: len(data) for name, data in MODEL.items() if name != "pytorch_model.bin"
    }
    assert sources.base_model_path(run, read_config(run.root)).name == first["model"]
    assert f"lab/model@{first['model'][:8]}" in REGISTRY["prefetch"].headline(run.values("prefetch"))

    for name in ("models/lab/model", "models/lab/tokenizer", "models/lab/reward"):
        hub.commit(name, {**hub.repositories[name][0][1], "README.md": b"new"})
    moved = hub.commit("datasets/lab/pairs", pairs("b"))
    assert prefetch(run, hub)[0] == 0
    assert commits(run) == taken
    assert " a" in (run.root / "out" / "data" / "train.jsonl").read_text()

    before = REGISTRY["sft"].settings(context_of(run))
    assert prefetch(run, hub, HH_PIPELINE_FORCED="1")[0] == 0
    assert commits(run)["data"] == moved
    assert not set(commits(run).values()) & set(taken.values())
    assert " b" in (run.root / "out" / "data" / "train.jsonl").read_text()
    assert REGISTRY["sft"].settings(context_of(run)) != before  # other weights: it runs again


def test_only_the_asked_folders_of_a_data_set_are_fetched(hub: StandInHub, tmp_path: Path) -> None:
    folders = {f"{folder}/{name}": data for folder in ("one", "two") for name, data in pairs(folder).items()}
    hub.commit("datasets/lab/pairs", folders)
    hub.commit("models/lab/model", MODEL)
    run = run_of(tmp_path / "run", "data.source=lab/pairs", "data.subsets=[two]")
    assert prefetch(run, hub)[0] == 0
    assert (run.root / "out" / "data" / "train.jsonl").read_text().count(" two") == 1
    assert set(sources.pins(run)["data"].files) == {"two/train.jsonl", "two/test.jsonl"}


def test_a_download_that_was_cut_off_is_never_taken_for_whole(hub: StandInHub, tmp_path: Path) -> None:
    hub.commit("models/lab/model", MODEL)
    hub.cut = "model.safetensors"
    run = run_of(tmp_path / "run")
    status, line = prefetch(run, hub)
    assert (status, line.startswith("error: model.path: lab/model: neither a folder nor")) == (2, True), line
    assert not (run.root / "out" / "result.json").exists()
    status, line = prefetch(run, hub, HF_HUB_OFFLINE="1")  # the cache holds a part
    assert (status, line.startswith("error: model.path: lab/model: ")) == (2, True), line
    hub.cut = None
    assert prefetch(run, hub)[0] == 0
    model = sources.base_model_path(run, read_config(run.root))
    assert (model / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("why", ["switched off", "out of reach"])
def test_without_the_hub_its_cache_serves(hub: StandInHub, tmp_path: Path, why: str) -> None:
    commit = hub.commit("models/lab/model", MODEL)
    hub.commit("datasets/lab/pairs", pairs("a"))
    first = run_of(tmp_path / "first", "data.source=lab/pairs")
    assert prefetch(first, hub)[0] == 0
    second = run_of(tmp_path / "second", "data.source=lab/pairs")
    away = {"HF_HUB_OFFLINE": "1"} if why == "switched off" else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    status, line = prefetch(second, hub, **away)
    assert status == 0, line
    assert commits(second)["model"] == commit


def pinned_run(folder: Path) -> tuple[RunDir, Path]:
    """A run whose prefetch took lab/model, without a hub: its snapshot is links into blobs, as in the cache."""
    run = run_of(folder / "run", "all=[prefetch, sft]")
    snapshot = folder / "hub" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (folder / "hub" / "blob").write_bytes(WEIGHTS)
    (snapshot / "model.safetensors").symlink_to("../../blob")
    (snapshot / "config.json").write_text("{}")
    files = {"model.safetensors": len(WEIGHTS), "config.json": 2}
    pin: dict[str, Any] = {"name": "lab/model", "revision": None, "commit": "c0ffee", "folder": str(snapshot)}
    known = basis(REGISTRY["prefetch"], context_of(run))
    values = {"hub": {"model": {**pin, "files": files}}}
    run.write_outputs(Outputs("prefetch", fingerprint(known), 1, values=values, basis=known))
    return run, snapshot


def purge_folder(snapshot: Path) -> None:
    shutil.rmtree(snapshot)


def purge_blob(snapshot: Path) -> None:
    (snapshot.parents[1] / "blob").unlink()


def purge_link(snapshot: Path) -> None:
    (snapshot / "config.json").unlink()


def cut_blob(snapshot: Path) -> None:
    (snapshot.parents[1] / "blob").write_bytes(b"less")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (purge_folder, r"the snapshot that prefetch took, .*c0ffee, is not on .*; set cluster\.cache \(or HF_HOME\)"),
        (purge_blob, r"its snapshot is incomplete: .*model\.safetensors is missing; run --stage prefetch again"),
        (purge_link, r"its snapshot is incomplete: .*config\.json is missing"),
        (cut_blob, r"its snapshot is damaged: .*model\.safetensors has 4 bytes, not 200000"),
    ],
)
def test_a_snapshot_that_is_not_whole_here_stops_a_stage_before_it_starts(tmp_path: Path, harm: Any, said: str) -> None:
    run, snapshot = pinned_run(tmp_path)
    assert [each.action for each in make_plan(context_of(run), ["prefetch", "sft"], (), {})] == ["skip", "run"]
    harm(snapshot)
    with pytest.raises(UserError, match=rf"^model\.path: lab/model: {said}"):
        sources.check_sources(run, read_config(run.root), "sft")
    with pytest.raises(UserError, match=r"^model\.path: lab/model: "):  # also where it is submitted
        make_plan(context_of(run), ["sft"], (), {})
    fetched, _ = make_plan(context_of(run), ["prefetch", "sft"], (), {})  # with prefetch it is fetched again
    assert (fetched.action, fetched.reason.startswith("model.path: ")) == ("run", True)


def test_a_snapshot_outside_the_clusters_cache_is_fetched_into_it(tmp_path: Path) -> None:
    run, _ = pinned_run(tmp_path)
    context = context_of(run)
    cluster = context.config.cluster.model_copy(update={"cache": str(tmp_path / "shared")})
    moved = Context(run, context.config.model_copy(update={"cluster": cluster}), context.hashes)
    (fetched,) = make_plan(moved, ["prefetch"], (), {})
    assert (fetched.action, "is not in cluster.cache" in fetched.reason) == ("run", True)


def test_another_model_or_revision_than_was_fetched_is_not_used(tmp_path: Path) -> None:
    run, _ = pinned_run(tmp_path)
    for change in ("model.path=lab/other", "model.revision=v2"):
        config = resolve(load_preset("demo"), ["model.path=lab/model", change])
        with pytest.raises(UserError, match=r"model\.path: lab/.*: neither a folder nor prefetched"):
            sources.base_model_path(run, config)


def test_a_finished_stage_whose_files_are_gone_is_named_where_one_submits(tmp_path: Path) -> None:
    run, _ = pinned_run(tmp_path)
    outputs = run.outputs("prefetch")
    assert outputs is not None
    run.write_outputs(replace(outputs, artifacts={"data": Artifact("stages/prefetch/data", "0", 7)}))
    said = r"--stage sft: needs prefetch, but its artifact data is gone .*; add it, as in --stage prefetch,sft"
    with pytest.raises(UserError, match=said):
        make_plan(context_of(run), ["sft"], (), {})


def test_a_folder_that_this_node_does_not_see_is_named(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "model.path=/no/such/folder")
    with pytest.raises(UserError, match=r"model\.path: /no/such/folder: no such folder on .*; put it where all nodes"):
        sources.check_sources(run, read_config(run.root), "sft")


@pytest.mark.chain
def test_a_stage_runs_from_the_snapshot_when_the_hub_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    embedded = tmp_path / "embedded"
    assert submit(embedded, "--stage", "prefetch").status == 0
    model = RunDir(embedded).artifact("prefetch", "model")
    run, cache = tmp_path / "run", tmp_path / "shared"
    settings = (*TINY, "model.path=lab/model", "sft.max_length=128", f"cluster.cache={cache}")
    with standing_in() as hub:
        commit = hub.commit("models/lab/model", {path.name: path.read_bytes() for path in model.iterdir()})
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
        fetched = submit(run, "--stage", "prefetch", overrides=settings, env=environment)
        assert fetched.status == 0, fetched.err
        asked = len(hub.asked)
    assert (cache / "huggingface" / "hub" / "models--lab--model" / "snapshots" / commit).is_dir()
    trained = submit(run, "--stage", "sft", overrides=settings, env=environment)
    assert trained.status == 0, trained.err
    assert len(hub.asked) == asked
    (cache / "huggingface" / "hub" / "models--lab--model" / "snapshots" / commit / "model.safetensors").unlink()
    refused = submit(run, "--stage", "sft", "--force", overrides=settings, env=environment)
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "error: model.path: lab/model: its snapshot is incomplete: " in refused.err
