"""What each stage's work finds in its environment: shared caches, a hub that is off, a proxy where it is on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.cluster import Cluster
from pipeline.config.load import resolve
from pipeline.run.directory import RunDir
from pipeline.serving.sandbox import cache_dir
from pipeline.stages.base import Work
from pipeline.stages.execute import environment_of
from pipeline.stages.registry import REGISTRY
from pipeline.stages.surroundings import node_folder, proxy_variables, surroundings

ONLINE = {"prefetch", "sandbox"}


def environment(stage: str, tmp_path: Path, **cluster: Any) -> dict[str, str]:
    """The whole environment of a stage's work, as a job gives it."""
    config = resolve({"cluster": {"executor": "slurm", **cluster}})
    return environment_of(REGISTRY[stage], Work(RunDir(tmp_path), config, tmp_path / "out", cpus=2), {})


@pytest.fixture(autouse=True)
def _a_plain_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("HF_", "WANDB_", "SLURM_", "TORCH", "TRITON_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("stage", sorted(set(REGISTRY) - {"serve"}))
def test_the_hub_is_off_and_the_proxy_out_of_sight_after_the_fetching_stages(stage: str, tmp_path: Path) -> None:
    env = environment(stage, tmp_path, proxy="http://proxy:3128")
    off = {name: env.get(name) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")}
    proxies = {name: env.get(name) for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    if stage in ONLINE:
        assert set(off.values()) == {None}
        assert set(proxies.values()) == {"http://proxy:3128"}
        assert env["no_proxy"] == env["NO_PROXY"] == "localhost,127.0.0.1,::1"
    else:
        assert set(off.values()) == {"1"}
        assert set(proxies.values()) == {None}


def test_what_the_user_spared_from_the_proxy_stays_spared() -> None:
    assert (
        proxy_variables("p", {"NO_PROXY": "mirror.site, 127.0.0.1"})["no_proxy"]
        == "mirror.site,127.0.0.1,localhost,::1"
    )


def test_the_clusters_cache_holds_the_hubs_files_for_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/h/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for stage in ("prefetch", "train"):
        env = environment(stage, tmp_path, cache="/shared/me")
        assert env["HF_HOME"] == "/shared/me/huggingface"
        assert env["HF_TOKEN_PATH"] == "/h/me/.cache/huggingface/token"  # where `hf auth login` wrote it
    assert str(cache_dir(resolve({"cluster": {"cache": "/shared/me"}}))) == "/shared/me/hh-pipeline"
    monkeypatch.setenv("HF_HOME", "/mine")
    assert environment("train", tmp_path, cache="/shared/me")["HF_HOME"] == "/mine"


def test_a_relative_cache_is_below_the_submitters_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORK", "/work of mine")
    assert resolve({}, ["cluster.cache=cache"]).cluster.cache == str(tmp_path / "cache")
    assert resolve({}, ["cluster.cache=$WORK/cache"]).cluster.cache == "/work of mine/cache"


@pytest.mark.parametrize(
    ("profile", "said", "mode"),
    [
        ({"executor": "slurm"}, {}, "offline"),
        ({"executor": "slurm", "internet": True}, {}, None),
        ({"executor": "local"}, {}, None),
        ({"executor": "local", "internet": False}, {}, "offline"),
        ({"executor": "slurm"}, {"WANDB_MODE": "online"}, None),
    ],
)
def test_weights_and_biases_is_offline_where_nodes_have_no_internet(
    profile: dict[str, Any], said: dict[str, str], mode: str | None
) -> None:
    assert surroundings(Cluster.model_validate(profile), True, said).get("WANDB_MODE") == mode


def test_compiled_code_is_cached_on_the_nodes_own_disk(tmp_path: Path) -> None:
    job = {"SLURM_JOB_ID": "7", "TMPDIR": str(tmp_path), "TRITON_CACHE_DIR": "/mine"}
    added = surroundings(Cluster(executor="slurm"), True, job)
    own = tmp_path / f"hh-pipeline-{os.getuid()}"
    assert added["TORCH_EXTENSIONS_DIR"] == str(own / "torch_extensions")
    assert added["TORCHINDUCTOR_CACHE_DIR"] == str(own / "inductor")
    assert "TRITON_CACHE_DIR" not in added
    assert own.stat().st_mode & 0o777 == 0o700
    assert "TORCH_EXTENSIONS_DIR" not in surroundings(Cluster(), True, {"TMPDIR": str(tmp_path)})  # no cluster's node


def test_a_folder_that_somebody_else_laid_out_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"hh-pipeline-{os.getuid()}").symlink_to(tmp_path / "theirs")
    assert node_folder({"TMPDIR": str(tmp_path)}).parent == tmp_path
    assert not list((tmp_path / "theirs").iterdir())
    assert not node_folder({"TMPDIR": str(tmp_path)}).is_symlink()
