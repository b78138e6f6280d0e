"""`python -m pipeline.convert`: from the hub or a folder, small in memory, and never half a store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_hub import standing_in
from helpers_serving import save_reward_model, serving_config, tiny_model, tiny_tokenizer

from pipeline import convert
from pipeline.config.load import dump, read_config
from pipeline.config.schema import Config
from pipeline.config.serving import Sandbox
from pipeline.errors import UserError
from pipeline.run import atomic, sources
from pipeline.run.directory import Artifact, Outputs, RunDir
from pipeline.run.lock import lock
from pipeline.serving import model_store

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--dtype", "float32", "--max-length", "64")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this project's Python with a clean hub environment."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HTTP", "http"))}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def original(folder: Path) -> Path:
    """A checkpoint as trlX's reward model training left it: weights among other files, nothing that describes them."""
    model = tiny_model("gptj")
    folder.mkdir()
    weights = {name.replace("score.", "v_head."): tensor for name, tensor in model.state_dict().items()}
    torch.save(weights, folder / "hf_ckpt.pt")
    (folder / "optimizer.pt").write_bytes(b"o" * 1000)
    (folder / "training_args.bin").write_bytes(b"t")
    return folder


def base_model(folder: Path) -> Path:
    tiny_model("gptj").config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"weights that nobody needs")
    return folder


def test_the_originals_command_works_and_so_does_a_run_of_the_same(tmp_path: Path) -> None:
    home = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    with standing_in() as hub:
        base_commit = hub.commit("models/lab/gptj", files_of(base_model(tmp_path / "base")))
        commit = hub.commit("models/lab/gptj-rm", files_of(original(tmp_path / "rm")))
        hub.commit("models/lab/gptj-rm", {"README.md": b"moved on"})
        hub.commit("models/lab/gptj", {"config.json": b"of another model by now"})
        base = ("--base-model", "lab/gptj", "--base-revision", base_commit[:8])
        named = (*base, "--checkpoint", "lab/gptj-rm", "--revision", commit[:8])
        out = ("--out", str(tmp_path / "model_store"))
        online = {**home, "HF_ENDPOINT": hub.endpoint}
        done = python("-m", "pipeline.convert", *named, *out, *SMALL, "--set", "serving.num_threads=2", **online)
        assert done.returncode == 0, done.stderr
        assert "model_store/gptj-rm: float32, at most " in done.stdout
        pinned = {"checkpoint_base": "lab/gptj", "checkpoint_base_revision": base_commit[:8]}
        run = run_of(tmp_path / "run", checkpoint="lab/gptj-rm", revision=commit[:8], **pinned)
        prefetched = python(
            "-m", "pipeline.data.prefetch", "--run", str(run.root), "--out", str(run.root / "out"), **online
        )
        assert prefetched.returncode == 0, prefetched.stderr
        fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
        assert fetched == {"hf_ckpt.pt", "config.json", "tokenizer.json", "tokenizer_config.json"}
    manifest = model_store.read_manifest(tmp_path / "model_store")
    assert (manifest.model_name, Path(manifest.source).name) == ("gptj-rm", commit)

    values = json.loads((run.root / "out" / "result.json").read_text())["values"]
    run.write_outputs(Outputs("prefetch", "f", 1, values=values))
    commits = {key: pin.commit for key, pin in sources.pins(run).items()}
    assert commits == {"reward_model": commit, "checkpoint_base": base_commit}
    assert sources.pins(run)["reward_model"].files.keys() == {"hf_ckpt.pt"}
    with pytest.raises(UserError, match=rf"{commit}: has no config\.json, so it must be converted first; run --stage"):
        model_store.reward_folder(run, read_config(run.root))
    offline = {**home, "HF_HUB_OFFLINE": "1"}
    stage = python(
        "-m", "pipeline.serving.convert", "--run", str(run.root), "--out", str(run.root / "stage"), **offline
    )
    assert stage.returncode == 0, stage.stderr
    assert model_store.read_manifest(run.root / "stage" / "model_store").identity == manifest.identity
    artifacts = {"model_store": Artifact("stage/model_store", "0" * 64, 0)}
    run.write_outputs(Outputs("convert", "f", 1, artifacts))
    assert (model_store.reward_folder(run, read_config(run.root)) / "tokenizer.json").is_file()

    again = python("-m", "pipeline.convert", *named, *out, *SMALL, **offline)
    assert again.returncode == 0, again.stderr
    other = python("-m", "pipeline.convert", *named[:-1], "0badc0de", *out, *SMALL, **offline)
    assert (other.returncode, other.stderr.count("\n")) == (2, 1), other.stderr
    assert other.stderr.startswith("error: --checkpoint: lab/gptj-rm: neither a folder nor to be had from the hub")
    assert sorted(path.name for path in tmp_path.iterdir() if "model_store" in path.name) == ["model_store"]


def run_of(folder: Path, **reward_model: Any) -> RunDir:
    folder.mkdir()
    settings = {**serving_config(max_length=64).plain(), "reward_model": reward_model}
    settings["data"] = {"source": "demo", "demo": {"train": 8, "test": 4}}
    tiny = {"vocab_size": 300, "hidden_size": 8, "num_heads": 2, "max_positions": 1024}
    settings["model"] = {"path": "embedded", "embedded": tiny}
    settings["all"] = ["prefetch", "convert"]
    (folder / "config.yaml").write_text(dump(Config.model_validate(settings)))
    return RunDir(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two reward models of one name."""
    folder = tmp_path_factory.mktemp("models")
    return save_reward_model(folder / "a" / "rm"), save_reward_model(folder / "b" / "rm", seed=1)


def test_a_conversion_killed_at_any_moment_leaves_the_old_store_or_the_new_one(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Conversions of two models in turn to the same place, each killed a little later than the one before."""
    out = tmp_path / "model_store"
    done = python(str(ROOT / "tests" / "helpers_interrupt.py"), str(models[0]), str(models[1]), str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(set(report["identities"])) == 2
    kills = report["kills"]
    assert all(kill["killed"] for kill in kills)
    assert [kill["replaced"] for kill in kills] == [kill["at"] > report["exchange"] for kill in kills]
    assert sum(bool(kill["left"]) for kill in kills) >= len(kills) - 2
    assert [path.name for path in tmp_path.iterdir()] == ["model_store"]  # the last one, which ended, swept it all


@pytest.mark.parametrize("moment", ["before the second name", "after it"])
def test_without_an_exchange_of_names_the_next_start_puts_it_right(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems cannot swap two names: there the folder moves in two steps."""
    target = tmp_path / "store"
    (target / "old").mkdir(parents=True)
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    with atomic.new_folder(target) as fresh:
        (fresh / "new").mkdir()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    if moment == "before the second name":
        target.rename(tmp_path / ".store.old")
    else:
        (tmp_path / ".store.old").mkdir()
    with pytest.raises(ZeroDivisionError), atomic.new_folder(target):
        raise ZeroDivisionError
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_failed_conversion_leaves_the_old_store(models: tuple[Path, Path], tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "model_store"))
    convert.main(["--checkpoint", str(models[0]), *out, *SMALL])
    before = model_store.read_manifest(tmp_path / "model_store")
    fault = rf"serving\.max_length: 129 is more than the 128 positions of {models[1]}; lower it"
    with pytest.raises(UserError, match=fault):  # not of the folder in which it was prepared, and which is gone
        convert.main(["--checkpoint", str(models[1]), *out, "--max-length", "129"])
    assert model_store.read_manifest(tmp_path / "model_store") == before
    assert [path.name for path in tmp_path.iterdir()] == ["model_store"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", "ppo.lam=1"), r"--set ppo\.lam=1: only settings of serving\.\* enter a model store"),
        (("--dtype", "int8"), r"serving\.dtype: input should be 'float32', .*int8"),
        (("--checkpoint", "/no/such/rm"), r"--checkpoint: /no/such/rm: no such file or folder"),
        (("--revision", "main"), r"--revision main: is of a hub id, and --checkpoint .*rm is a folder or file"),
        (("--base-model", "./base"), r"--base-model: \./base: no such file or folder"),
        (("--base-revision", "main"), r"--base-revision main: is of --base-model, which is not given"),
        (("--base-model", "/tmp", "--base-revision", "v"), r"--base-revision v: is of a hub id, and --base-model /tmp"),
        (("--out", "/proc/store"), r"--out /proc/store: cannot write in /proc \(.*\); choose another place"),
        (("--out", "/dev/null/store"), r"--out /dev/null/store: cannot write in /dev/null \(.*\); choose another"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: tuple[str, str], said: str, models: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        convert.main(["--checkpoint", str(models[0]), "--out", str(tmp_path / "store"), *arguments])
    assert not list(tmp_path.iterdir())


def test_only_an_earlier_store_of_the_same_model_is_replaced(models: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(models[0]), "--out", str(tmp_path)]
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not a model store; give another folder"):
        convert.main(arguments)
    atomic.write_json(tmp_path / model_store.MANIFEST, {"model_name": "another"})
    with pytest.raises(UserError, match="is the store of another, not of rm; give another folder, or remove it"):
        convert.main(arguments)
    assert (tmp_path / "thesis.txt").is_file()


def test_a_graph_is_checked_against_the_image_that_it_is_for(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("pipeline.serving.torchscript.check_image", lambda image, graph: asked.append(image))
    arguments = ["--checkpoint", str(models[0]), *SMALL, "--max-length", "16"]
    for name, options in (
        ("a", ["--flavour", "torchscript"]),
        ("b", ["--flavour", "torchscript", "--image", "docker://nvcr.io/nvidia/tritonserver:22.08-py3"]),
        ("c", ["--image", "docker://nvcr.io/nvidia/tritonserver:22.08-py3"]),
    ):
        convert.main([*arguments, "--out", str(tmp_path / name), *options])
    assert asked == [Sandbox().image, "docker://nvcr.io/nvidia/tritonserver:22.08-py3"]


def test_two_conversions_to_one_place_do_not_meet(models: tuple[Path, Path], tmp_path: Path) -> None:
    with (
        lock(tmp_path / ".store.lock", "converting something else"),
        pytest.raises(UserError, match=r"converting something else.*wait for it"),
    ):
        convert.main(["--checkpoint", str(models[0]), "--out", str(tmp_path / "store")])


MEASURED = """
import re, sys
from pathlib import Path
import torch, transformers
from pipeline.serving import model_store, prepare

def peak():  # getrusage's would begin with the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

source, base, store, dtype = *map(Path, sys.argv[1:4]), sys.argv[4]
before = peak()
with prepare.prepared(source, base, store / "scratch") as folder:
    model_store.place_model(folder, store / "model", dtype)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A GPT-J of 700 MB in the original's layout, in float32; its base model; its size."""
    folder = tmp_path_factory.mktemp("large")
    model = tiny_model("gptj", n_embd=1024, n_layer=12, n_head=8, rotary_dim=32, vocab=20000)
    weights = {name.replace("score.", "v_head."): tensor for name, tensor in model.state_dict().items()}
    model.config.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    (folder / "rm").mkdir()
    torch.save(weights, folder / "rm" / "hf_ckpt.pt")
    return folder / "rm", folder / "base", sum(tensor.nbytes for tensor in weights.values())


def test_weights_are_converted_in_less_memory_than_they_take(large: tuple[Path, Path, int], tmp_path: Path) -> None:
    """Whatever the size, 0.3 GB are needed for the mapped part of a file, and the largest tensor in two dtypes."""
    source, base, size = large
    done = python("-c", MEASURED, str(source), str(base), str(tmp_path), "bfloat16")
    assert done.returncode == 0, done.stderr
    used = int(done.stdout)
    assert 0 < used < 0.8 * size, f"{used / size:.2f} of {size >> 20} MB"
    assert model_store.stored_dtypes(tmp_path / "model") == {"BF16"}


WHOLE = """
import re, sys
from pathlib import Path
import torch, transformers
from pipeline.config.serving import Serving
from pipeline.serving import convert

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

source, base, store = map(Path, sys.argv[1:4])
before = peak()
convert.convert_checkpoint(source, base, store, Serving(dtype="bfloat16", max_length=16, parity_tolerance=0.5))
print(peak() - before)
"""


def test_a_conversion_takes_the_models_own_size_though_its_head_is_wider_than_the_rest(tmp_path: Path) -> None:
    """As DeepSpeed leaves it: all in float16 but the head. Comparing included; 100 MB are there whatever the size."""
    model = tiny_model("gptj", n_embd=1024, n_layer=8, n_head=8, rotary_dim=32)
    head = {"v_head.weight": model.score.weight.detach()}
    weights = {**{name: value.half() for name, value in model.transformer.named_parameters("transformer")}, **head}
    model.config.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "rm").mkdir()
    torch.save(weights, tmp_path / "rm" / "hf_ckpt.pt")
    size = sum(value.nbytes for value in weights.values())
    assert 150 << 20 < size < 300 << 20
    del model, weights, head
    done = python("-c", WHOLE, str(tmp_path / "rm"), str(tmp_path / "base"), str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
    used = int(done.stdout)
    assert size < used < 1.2 * size + (100 << 20), f"{used / size:.2f} of {size >> 20} MB"
