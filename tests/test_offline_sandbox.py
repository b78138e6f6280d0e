"""What prefetch fetches for a sandbox that is built offline, and fetches again once the cache has lost it."""

from __future__ import annotations

import base64
import hashlib
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from test_containers_registry import LAYER, MANIFEST, StandIn, digest_of, server  # noqa: F401

from pipeline.config.load import dump, load_preset, read_config, resolve
from pipeline.errors import UserError
from pipeline.run.directory import Outputs, RunDir
from pipeline.run.hashing import HashCache
from pipeline.serving import environment, sandbox
from pipeline.stages.base import Context
from pipeline.stages.plan import basis, fingerprint, verdict
from pipeline.stages.registry import REGISTRY

CLUSTER = "name: site\nexecutor: slurm\nengine: {engine}\n{more}\n"


def run_of(folder: Path, engine: str, *overrides: str, more: str = "") -> RunDir:
    folder.mkdir(parents=True)
    (folder / "site.yaml").write_text(CLUSTER.format(engine=engine, more=more))
    settings = ("sandbox.engine=auto", f"sandbox.cache_dir={folder / 'cache'}", *overrides)
    preset = {**load_preset("demo"), "preset": "demo"}
    (folder / "config.yaml").write_text(dump(resolve(preset, settings, str(folder / "site.yaml"))))
    return RunDir(folder)


def fetch(run: RunDir) -> dict[str, Any]:
    earlier, built = run.values("prefetch").get("sandbox"), run.values("sandbox")
    return sandbox.fetch(read_config(run.root), run.root / "log", lambda _: None, False, earlier, built)


def record(run: RunDir, fetched: dict[str, Any]) -> None:
    """As a prefetch that ended well."""
    known = basis(REGISTRY["prefetch"], context_of(run))
    run.write_outputs(Outputs("prefetch", fingerprint(known), 1, values={"sandbox": fetched}, basis=known))


def context_of(run: RunDir) -> Context:
    return Context(run, read_config(run.root), HashCache(run.root / "hashes.json"))


def planned(run: RunDir) -> tuple[str, str]:
    found = verdict(REGISTRY["prefetch"], context_of(run))
    return found.action, found.reason


def test_an_image_that_was_purged_in_part_or_whole_is_planned_and_fetched_again_by_its_digest(
    server: StandIn,  # noqa: F811
    tmp_path: Path,
) -> None:
    run = run_of(tmp_path / "run", "apptainer", f"sandbox.image={server.name}", "sandbox.packages=image")
    record(run, fetch(run))
    assert planned(run) == ("skip", "up to date")
    (layer,) = (run.root / "cache").glob(f"images/*-fetched/blobs/sha256/{digest_of(LAYER)[7:]}")
    layer.unlink()
    assert planned(run) == ("run", f"its image {server.name} is not in {run.root / 'cache'} any more")
    server.asked.clear()
    record(run, fetch(run))
    assert planned(run)[0] == "skip"
    shutil.rmtree(run.root / "cache")
    assert planned(run)[0] == "run"
    record(run, fetch(run))
    assert planned(run)[0] == "skip"
    asked = [path.rpartition("/")[2] for path, _ in server.asked]
    assert digest_of(MANIFEST) in asked
    assert "22.08" not in asked  # the tag may have moved on meanwhile


def test_an_image_that_was_built_needs_what_was_fetched_no_more(server: StandIn, tmp_path: Path) -> None:  # noqa: F811
    run = run_of(tmp_path / "run", "apptainer", f"sandbox.image={server.name}", "sandbox.packages=image")
    record(run, fetch(run))
    (fetched,) = (run.root / "cache" / "images").glob("*-fetched")
    built = fetched.with_name(fetched.name.replace("-fetched", "-sif"))
    built.mkdir()
    (built / "image.sif").touch()
    shutil.rmtree(fetched)
    assert planned(run)[0] == "skip"


def test_packages_that_were_purged_in_part_are_planned_again(server: StandIn, tmp_path: Path) -> None:  # noqa: F811
    run = run_of(tmp_path / "run", "apptainer", f"sandbox.image={server.name}", "sandbox.packages=image")
    site = tmp_path / "packages" / "site"
    for name in ("torch-2.dist-info", "transformers-5.dist-info"):
        (site / name).mkdir(parents=True)
        (site / name / "RECORD").touch()
    (site.parent / "manifest.json").write_text('{"packages": ["torch==2", "transformers==5"]}')
    record(run, {**fetch(run), "packages": str(site)})
    assert planned(run)[0] == "skip"
    (site / "torch-2.dist-info" / "RECORD").unlink()
    assert planned(run) == ("run", f"its packages are gone ({site})")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip finds one small package in a folder, and no network."""
    folder = tmp_path / "index"
    folder.mkdir()
    files = {
        "tiny.py": "",
        "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [f"{name},sha256={_sha256(text)},{len(text)}\n" for name, text in files.items()]
    files["tiny-1.0.dist-info/RECORD"] = "".join([*lines, "tiny-1.0.dist-info/RECORD,,\n"])
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(environment, "requirements", lambda: ["tiny==1.0"])
    return folder


def _sha256(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def test_where_nodes_are_offline_the_environments_packages_are_fetched_and_installed_from_the_cache(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path / "run", "venv")
    assert REGISTRY["sandbox"].after(read_config(run.root)) == ("prefetch",)
    record(run, {})
    assert planned(run)[0] == "run"
    fetched = fetch(run)
    assert [path.name for path in Path(fetched["packages"]).iterdir()] == ["tiny-1.0-py3-none-any.whl"]
    record(run, fetched)
    assert planned(run)[0] == "skip"

    shutil.rmtree(index)  # from here on nothing but the cache has it
    monkeypatch.setattr(environment, "_lay_out", lambda folder, site: None)
    monkeypatch.setattr(environment, "_verify", lambda engine: None)
    monkeypatch.setattr(sandbox, "_usable_venv", lambda folder: folder.is_dir())
    values = sandbox.prepare(read_config(run.root), run.root / "log", lambda _: None)
    assert len(list(Path(values["path"]).glob("lib/*/site-packages/tiny.py"))) == 1
    shutil.rmtree(Path(fetched["packages"]).parent)
    assert planned(run)[0] == "skip"  # the environment itself is there
    shutil.rmtree(values["path"])
    cache = run.root / "cache"
    assert planned(run) == ("run", f"the packages of the server's environment are not in {cache}")
    with pytest.raises(UserError, match=r"No matching distribution found for tiny==1\.0; name an index"):
        fetch(run)


@pytest.mark.parametrize("more", ["internet: true", "on_login_node: [prefetch, sandbox]"])
def test_where_the_sandbox_is_built_with_a_network_prefetch_leaves_its_packages_to_it(
    index: Path, tmp_path: Path, more: str
) -> None:
    run = run_of(tmp_path / "run", "venv", more=more)
    assert REGISTRY["sandbox"].after(read_config(run.root)) == ()
    assert fetch(run) == {}
    record(run, {})
    assert planned(run)[0] == "skip"
