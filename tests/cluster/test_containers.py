"""The chain with tritonserver, and then the trainer too, in real containers, on a Slurm that an ordinary user runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers_cluster import CHAIN_SETTINGS, PROFILE, environment_of, tasks
from helpers_jobs import copy_without, nothing_left, pids_running, policy_sha256, until_training, wait_for
from mini_slurm import MiniSlurm
from ordinary_user import ROOT, OrdinaryUser, remove
from registry import Registry
from triton_image import NAME

from pipeline.run import atomic, provenance
from pipeline.run.directory import RunDir

TRAINER_PACKAGES = Path("usr/lib/python3/dist-packages/trainer.pth")
"""Tells the image's Python where further packages are."""

MODELS = ("sft", "reward-model", "convert")

pytestmark = [pytest.mark.slurm, pytest.mark.triton, pytest.mark.chain, pytest.mark.apptainer]


class Site:
    """What the user has: a cluster, a folder that all nodes see, a registry that is reached by HTTP."""

    def __init__(self, user: OrdinaryUser, cluster: MiniSlurm, folder: Path, image: str) -> None:
        self.user, self.cluster, self.folder, self.image = user, cluster, folder, image
        programs = folder / "bin"  # this Apptainer has only one of its two names
        programs.mkdir()
        (programs / "singularity").symlink_to(shutil.which("apptainer") or "")
        own = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        self.environment = user.environment(APPTAINER_NOHTTPS="true", **cluster.environment, **own)
        self.environment["PATH"] = f"{programs}{os.pathsep}{self.environment['PATH']}"
        self.profile("site")

    def profile(self, name: str, **changes: object) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**PROFILE, "name": name, "engine": "singularity", **changes}))
        return path

    def settings(self, **changes: str) -> list[str]:
        wanted = {
            "sandbox.engine": "auto",  # the profile names it
            "sandbox.image": self.image,
            "sandbox.python": "'3.11'",
            "sandbox.format": "sandbox",
            "sandbox.cache_dir": str(self.folder / "cache"),
            **changes,
        }
        others = [setting for setting in CHAIN_SETTINGS if setting.partition("=")[0] not in wanted]
        return [part for each in (*others, *map("=".join, wanted.items())) for part in ("--set", each)]

    def submit(self, run: Path, *arguments: object, profile: str = "site", status: int = 0, **changes: str) -> str:
        argv = ["--preset", "demo", "--run-dir", run, "--cluster", self.folder / f"{profile}.yaml"]
        command = [sys.executable, "-m", "pipeline.submit", *argv, *self.settings(**changes), *arguments]
        done = self.user.run(*command, env=self.environment, cwd=ROOT)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def wait(self) -> None:
        wait_for(self.cluster.empty, "the jobs to end", 600)


@pytest.fixture(scope="module")
def site(user: OrdinaryUser, public_registry: Registry) -> Iterator[Site]:
    folder = user.folder("site")
    cluster = MiniSlurm(user.folder("slurm"), user)
    try:
        cluster.start()
        site = Site(user, cluster, folder, f"docker://{public_registry.address}/{NAME}")
        user.own(folder)
        yield site
    finally:
        cluster.stop()
        remove(cluster.folder)
        remove(folder)


@pytest.fixture(scope="module")
def contained(site: Site, finished: Path) -> Path:
    """The chain in one submission, looked at while it trains. What no container has a part in, models and their store,
    is that of the chain without containers, and is skipped."""
    run = copy_without(finished, site.folder / "a run", "prefetch", "sandbox", "serve", "train", "evaluate")
    site.user.own(run)
    site.submit(run, "--no-follow")
    wait_for(lambda: list(run.glob("checkpoints/*/step-00000004")), "the first checkpoint", 400)
    (server,) = (pid for pid in pids_running(run, "tritonserver --") if in_container(pid))
    ranks = pids_running(run, "-m pipeline.training.ppo", "-u")
    assert environment_of(server)["CUDA_VISIBLE_DEVICES"] == "7"
    assert {environment_of(pid)["CUDA_VISIBLE_DEVICES"] for pid in ranks} == {"0,1,2,3,4,5,6"}
    assert {"0", "1"} <= {environment_of(pid).get("RANK") for pid in ranks}
    site.wait()
    return run


def in_container(pid: int) -> bool:
    """Whether the process is the image's own tritonserver, and not the engine that started it."""
    return os.readlink(f"/proc/{pid}/exe") == "/opt/tritonserver/bin/tritonserver"


def test_the_chain_with_a_sandbox_from_a_registry_gives_the_weights_of_the_chain_without_containers(
    contained: Path, finished: Path, layout: Path, site: Site
) -> None:
    made, taken = ([RunDir(run).outputs(stage) for stage in MODELS] for run in (finished, contained))
    assert taken == made
    assert policy_sha256(contained) == policy_sha256(finished)
    sandbox = RunDir(contained).values("sandbox")
    assert (sandbox["engine"], sandbox["tritonserver"], sandbox["python"]) == ("singularity", "2.51.0", "3.11")
    assert sandbox["closes"]  # its server knows how to close what no client needs
    assert sandbox["digest"] == json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
    assert Path(sandbox["path"]) == site.folder / "cache" / "images" / f"{sandbox['digest'][7:23]}-sandbox" / "image"
    assert (Path(sandbox["path"]) / "opt" / "tritonserver").is_dir()
    wait_for(lambda: nothing_left(contained), "every process to end", 20)


def test_another_run_finds_the_image_and_keeps_it_when_the_tag_moves(
    contained: Path, site: Site, public_registry: Registry, layout: Path, tmp_path: Path
) -> None:
    first = RunDir(contained).values("sandbox")["digest"]
    moved = public_registry.push(relabelled(layout, tmp_path / "moved"), NAME)
    try:
        assert moved != first
        site.submit(site.folder / "second", "--stage", "sandbox")
        second = RunDir(site.folder / "second").values("sandbox")
        assert (second["digest"], second["built"]) == (first, False)
        site.submit(site.folder / "second", "--stage", "sandbox", "--force")
        assert RunDir(site.folder / "second").values("sandbox")["digest"] == moved
    finally:
        public_registry.push(layout, NAME)
    assert Path(RunDir(contained).values("sandbox")["path"]).is_dir()  # what a job may be using stays


def relabelled(layout: Path, target: Path) -> Path:
    """The same image under another digest."""
    shutil.copytree(layout, target)
    index = json.loads((target / "index.json").read_text())
    blobs = target / "blobs" / "sha256"
    manifest = json.loads((blobs / index["manifests"][0]["digest"][7:]).read_text())
    manifest["annotations"] = {"note": "a new build"}
    data = json.dumps(manifest).encode()
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    index["manifests"][0] |= {"digest": f"sha256:{digest}", "size": len(data)}
    (target / "index.json").write_text(json.dumps(index))
    return target


def test_what_prefetch_fetched_is_built_where_there_is_no_network(
    contained: Path, site: Site, layout: Path, tmp_path: Path
) -> None:
    closing = Registry(tmp_path / "registry")
    closing.folder.mkdir()
    closing.start()
    digest = closing.push(relabelled(layout, tmp_path / "image"), NAME)
    run, image = site.folder / "offline", {"sandbox.image": f"docker://{closing.address}/{NAME}"}
    fresh = {**image, "sandbox.cache_dir": str(site.folder / "cache")}
    site.submit(run, "--stage", "prefetch", **fresh)
    closing.stop()
    assert RunDir(run).values("prefetch")["sandbox"]["digest"] == digest
    site.submit(run, "--stage", "sandbox", **fresh)
    assert RunDir(run).values("sandbox")["digest"] == digest
    assert not list((site.folder / "cache" / "images").glob("*-fetched"))  # as large as the image, and needed no more
    site.submit(run, "--stage", "sandbox", "--force", **fresh)  # its own image again, without a network
    said = site.submit(site.folder / "another", "--stage", "sandbox", "--force", status=1, **fresh)
    assert "the registry cannot be reached" in said
    assert "oci-archive:FILE" in said


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_an_image_in_a_file_needs_no_registry(
    kind: str, contained: Path, site: Site, request: pytest.FixtureRequest
) -> None:
    archive: Path = request.getfixturevalue(kind.replace("-", "_"))
    run = site.folder / kind
    site.submit(run, "--stage", "sandbox", **{"sandbox.image": f"{kind}:{archive}"})
    values = RunDir(run).values("sandbox")
    assert (values["tritonserver"], len(values["digest"])) == ("2.51.0", 64)


def test_an_image_is_built_from_a_definition_and_a_sandbox_is_used_where_it_is(contained: Path, site: Site) -> None:
    sandbox = RunDir(contained).values("sandbox")["path"]
    definition = site.folder / "our own.def"
    definition.write_text(f"Bootstrap: localimage\nFrom: {sandbox}\n\n%post\n    echo ours >/opt/note\n")
    site.user.own(definition)
    run = site.folder / "defined"
    site.submit(run, "--stage", "sandbox", **{"sandbox.image": str(definition)})
    made = RunDir(run).values("sandbox")
    assert (made["built"], made["tritonserver"]) == (True, "2.51.0")
    assert made["digest"] == hashlib.sha256(definition.read_bytes()).hexdigest()
    assert (Path(made["path"]) / "opt" / "note").read_text() == "ours\n"

    run = site.folder / "a folder"
    site.submit(run, "--stage", "sandbox", **{"sandbox.image": made["path"]})
    used = RunDir(run).values("sandbox")
    assert (used["built"], used["path"], used["tritonserver"]) == (False, made["path"], "2.51.0")


@pytest.fixture(scope="module")
def sif(contained: Path, site: Site) -> Path:
    """The image as one file: made of the sandbox that is there, not fetched again."""
    run = site.folder / "sif"
    digest = RunDir(contained).values("sandbox")["digest"]
    image = f"{site.image.rpartition(':')[0]}@{digest}"  # its tag has moved, for all runs of this cache
    site.submit(run, "--stage", "sandbox", **{"sandbox.format": "sif", "sandbox.image": image})
    values = RunDir(run).values("sandbox")
    assert values["digest"] == digest
    assert Path(values["path"]).name == "image.sif"
    return Path(values["path"])


@pytest.fixture(scope="module")
def trainer(contained: Path, site: Site) -> Path:
    """An image for the trainer: the server's, whose Python finds the tests' packages where the profile binds them."""
    image = site.folder / "trainer"
    made = site.user.run("cp", "-a", RunDir(contained).values("sandbox")["path"], image)
    assert made.returncode == 0, made.stderr
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    (image / TRAINER_PACKAGES).write_text(f"{packages}\n")
    site.profile("contained", trainer_image=str(image), binds=[packages])
    return image


def test_server_from_one_file_unpacked_on_its_node_and_trainer_in_a_container_give_the_same_weights(
    contained: Path, sif: Path, trainer: Path, site: Site
) -> None:
    run = copy(contained, site.folder / 'it\'s "one", file', site)
    settings = {"sandbox.image": str(sif), "sandbox.format": "sif", "sandbox.unpack_on_node": "true"}
    site.submit(run, "--stage", "sandbox,serve,train,evaluate", "--no-follow", profile="contained", **settings)
    wait_for(lambda: list(run.glob("checkpoints/*/step-00000004")), "the first checkpoint", 400)
    ranks = pids_running(run, "-m pipeline.training.ppo", "-u")
    ranks = [pid for pid in ranks if "RANK" in environment_of(pid)]
    assert ranks
    assert all(
        (Path(f"/proc/{pid}/root") / TRAINER_PACKAGES).exists() for pid in ranks
    )  # in the trainer's image, not the host
    assert {environment_of(pid)["CUDA_VISIBLE_DEVICES"] for pid in ranks} == {"0,1,2,3,4,5,6"}
    site.wait()
    assert policy_sha256(run) == policy_sha256(contained)
    made_in = provenance.trainer_image(RunDir(run))
    assert made_in is not None
    assert made_in["file"] == str(trainer)
    assert [RunDir(run).values(stage).get("trainer_image") for stage in ("train", "evaluate")] == [
        made_in["digest"]
    ] * 2
    wait_for(lambda: nothing_left(run), "every process to end", 20)
    assert not list(Path("/tmp").glob("hh-image-*"))


def test_a_killed_job_takes_its_containers_and_their_mounts_along_and_the_next_goes_on(
    contained: Path, sif: Path, trainer: Path, site: Site
) -> None:
    run = copy(contained, site.folder / "killed", site)
    mounted = {"sandbox.image": str(sif), "sandbox.format": "sif"}
    arguments = ("--stage", "sandbox,serve,train")
    site.submit(run, *arguments, "--no-follow", profile="contained", **mounted)
    wait_for(lambda: list(run.glob("checkpoints/*/step-00000004")), "the first checkpoint", 400)
    assert mounts_of(sif)
    for pid in tasks(run):
        os.kill(pid, signal.SIGKILL)
    site.wait()
    wait_for(lambda: not pids_running(run) and not mounts_of(sif), "every process to end", 20)
    site.submit(run, *arguments, profile="contained", **mounted)
    assert policy_sha256(run) == policy_sha256(contained)
    wait_for(lambda: nothing_left(run) and not mounts_of(sif), "every process to end", 20)


def mounts_of(sif: Path) -> list[int]:
    """The processes that hold a .sif file mounted: squashfuse, whose environment and command line do not tell of it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if "squashfuse" in (process / "comm").read_text():
                found += [int(process.name)] if str(sif) in map(os.readlink, (process / "fd").iterdir()) else []
    return found


def copy(contained: Path, run: Path, site: Site) -> Path:
    """The run before its training, as the user's."""
    until_training(contained, run)
    site.user.own(run)
    return run


def test_an_image_that_cannot_serve_is_refused_with_the_setting_that_mends_it(contained: Path, site: Site) -> None:
    run = site.folder / "refused"
    said = site.submit(run, "--stage", "sandbox", status=1, **{"sandbox.python": "'3.12'", "sandbox.packages": "image"})
    assert "its Python cannot import torch and transformers" in said
    assert "use sandbox.packages=trainer" in said
    state = atomic.read_json(run / "stages" / "sandbox" / "state.json")
    assert state is not None
    assert state["state"] == "failed"
