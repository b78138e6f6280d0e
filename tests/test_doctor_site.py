"""What the doctor makes of recorded facts of folders, networks and machines."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_doctor import ON_SLURM, config, faults, warnings

from pipeline.run.directory import RunDir
from pipeline.site import folders, gpus, machine, named, network, storage
from pipeline.site.ask import ask, together
from pipeline.site.findings import Finding, fails, render
from pipeline.site.folders import Use
from pipeline.site.gpus import GpuFacts
from pipeline.site.machine import MachineFacts
from pipeline.site.network import NetworkFacts
from pipeline.site.storage import GIB, Folder

# Folders

ROOMY = Folder("runs", "runs", "nfs4", ("rw",), 10_000 * GIB, 10**9, writable=True)


def judged(folder: Folder | None, cluster: dict[str, object] | None = ON_SLURM, **use: object) -> list[Finding]:
    wanted = Use(**{"path": Path("runs"), "name": "run directory", "key": "--run-dir", "gib": 100, **use})
    return folders.judge({"run directory": folder}, [wanted], config(cluster=cluster))


def changed(**changes: object) -> Folder:
    return Folder(**{**vars(ROOMY), **changes})


def test_a_good_folder_has_one_line() -> None:
    assert [each.level for each in judged(ROOMY)] == ["ok"]


@pytest.mark.parametrize(
    ("folder", "level", "words"),
    [
        (None, "fail", "its file system does not answer"),
        (changed(writable=False), "fail", "you cannot write"),
        (changed(broken=("hard links (Operation not permitted)",)), "fail", "does not work there: hard links"),
        (changed(free=10 * GIB), "fail", "10 GiB free, and some 100 GiB are needed"),
        (changed(free=60 * GIB), "warn", "60 GiB free, and some 100 GiB are needed"),
        (changed(free_inodes=2000), "warn", "room for 2000 more files only"),
        (changed(quota="the quota is nearly used up: 19 of 20 GiB"), "warn", "nearly used up"),
        (changed(kind="tmpfs"), "warn", "on a file system of this machine alone (tmpfs)"),
        (changed(path="/tmp/runs", kind="ext4"), "warn", "on a file system of this machine alone (ext4)"),
        (changed(kind="ext4"), "unknown", "all nodes must see it"),
    ],
)
def test_what_may_be_wrong_with_a_folder(folder: Folder | None, level: str, words: str) -> None:
    (found,) = judged(folder)
    assert (found.level, words in found.what) == (level, True), found.what
    assert "--run-dir" in found.remedy


def test_only_slurms_jobs_need_a_shared_folder_and_only_images_run_programs() -> None:
    assert [each.level for each in judged(changed(kind="tmpfs"), cluster=None)] == ["ok"]
    assert [each.level for each in judged(changed(options=("rw", "noexec")))] == ["ok"]
    assert [each.level for each in judged(changed(options=("rw", "noexec")), unpacks=True)] == ["fail"]


def test_the_folders_of_a_run_follow_its_variables(tmp_path: Path) -> None:
    environ = {"HF_HOME": "/data/hf", "SINGULARITY_CACHEDIR": "/data/sif", "APPTAINER_TMPDIR": "/local/tmp"}
    cluster = {**ON_SLURM, "scratch": "$NO_SUCH_VARIABLE_HERE/x"}
    found = {
        use.name: use.path for use in folders.uses(RunDir(tmp_path), config(cluster=cluster), "apptainer", environ)
    }
    assert found["run directory"] == tmp_path
    assert found["models and data"] == Path("/data/hf")
    assert found["the engine's cache"] == Path("/data/sif")
    assert found["unpacking images"] == Path("/local/tmp")
    assert "scratch" not in found  # jobs alone know it
    (note,) = [each for each in folders.judge({}, [], config(cluster=cluster)) if each.level == "unknown"]
    assert note.what.startswith("cluster.scratch: $NO_SUCH_VARIABLE_HERE/x is known to jobs only")


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("EleutherAI/gpt-j-6B", 6.0),
        ("Dahoas/pythia-125M-static-sft", 0.125),
        ("EleutherAI/gpt-neox-20b", 20.0),
        ("some/model", 8.0),
    ],
)
def test_the_space_that_a_run_needs_follows_its_models_size(tmp_path: Path, model: str, size: float) -> None:
    wanted = config(f"model.path={model}")
    assert folders.billions(wanted) == size
    assert folders.billions(config(preset="demo")) == 0
    (run,) = [use for use in folders.uses(RunDir(tmp_path), wanted, "venv", {}) if use.name == "run directory"]
    assert run.gib == max(1, round(12 * size))


def test_shared_memory_must_be_there_and_large_enough() -> None:
    shm = changed(path="/dev/shm", kind="tmpfs", free=8 * GIB)
    assert folders.judge_shm(shm)[0].level == "ok"
    assert folders.judge_shm(changed(kind="tmpfs", free=64 * 1024**2))[0].level == "warn"  # docker's default
    assert folders.judge_shm(changed(kind="ext4"))[0].level == "fail"


def test_a_folder_is_tried_for_real_and_left_as_it_was(tmp_path: Path) -> None:
    mounts = storage.read_mounts(Path("/proc/mounts").read_text())
    found = storage.look(tmp_path / "not" / "yet", mounts)
    assert (found.existing, found.writable, found.broken) == (str(tmp_path), True, ())
    assert found.free > 0
    assert list(tmp_path.iterdir()) == []


def test_a_path_belongs_to_the_nearest_mount_above_it() -> None:
    mounts = storage.read_mounts(
        "/dev/sda / ext4 rw 0 0\nfs1:/home /home nfs4 rw,noexec 0 0\n"
        "auto /data autofs rw 0 0\nfs2:/data /data lustre rw 0 0\n"
        "x /with\\040space tmpfs rw 0 0\n"
    )
    assert storage.mount_of(Path("/home/me/runs"), mounts).kind == "nfs4"
    assert "noexec" in storage.mount_of(Path("/home/me/runs"), mounts).options
    assert storage.mount_of(Path("/homes"), mounts).kind == "ext4"
    assert storage.mount_of(Path("/data/x"), mounts).kind == "lustre"  # mounted over the automounter
    assert storage.mount_of(Path("/with space/x"), mounts).kind == "tmpfs"


def test_quotas_are_read_from_quota_and_from_lustre() -> None:
    head = "Disk quotas for user me (uid 1000):\n Filesystem  blocks  quota  limit  grace  files  quota  limit  grace\n"
    assert storage.read_quota(head + "fs1:/home 9437184 20971520 20971520 120000 0 0\n") == ""
    assert storage.read_quota(head + "fs1:/home 20447232 20971520 20971520 120000 0 0\n") == (
        "the quota is nearly used up: 19 of 20 GiB"
    )
    assert "exceeded" in storage.read_quota(head + "fs1:/home 21000000* 20971520 31457280 6days 120000 0 0\n")
    assert "exceeded" in storage.read_quota("/lustre 21000000* 20971520 31457280 6d 120000 0 0 -\n")
    assert storage.read_quota("Disk quotas for user me (uid 1000): none\n") == ""


# Network


def reached(**changes: object) -> NetworkFacts:
    return NetworkFacts(**{"hub": "https://hub", "interfaces": ("lo", "eth0"), "wandb_key": True, **changes})


def test_a_hub_out_of_reach_stops_prefetch_unless_it_is_done_or_not_ours_to_do() -> None:
    facts = reached(reached={"https://hub": "timed out"})
    assert faults(network.judge(facts, config(), False, False)) == ["https://hub cannot be reached: timed out"]
    assert faults(network.judge(facts, config(), prefetched=True, inside_job=False)) == []
    assert faults(network.judge(facts, config(), prefetched=False, inside_job=True)) == []
    assert faults(network.judge(reached(), config(), False, False)) == []
    assert faults(network.judge(reached(hub=""), config(preset="demo"), False, False)) == []
    assert len(warnings(network.judge(reached(hub_offline=True), config(), False, False))) == 1


def test_a_key_for_weights_and_biases_is_missed_only_where_it_is_used(tmp_path: Path) -> None:
    assert len(warnings(network.judge(reached(wandb_key=False), config(), False, False))) == 1
    assert warnings(network.judge(reached(wandb_key=False, wandb_mode="offline"), config(), False, False)) == []
    assert warnings(network.judge(reached(wandb_key=False), config("train.tracker=none"), False, False)) == []
    secrets = tmp_path / "netrc"
    secrets.write_text("machine api.wandb.ai login user password 0123\n")
    assert network._has_wandb_key({"NETRC": str(secrets)})
    assert not network._has_wandb_key({"NETRC": str(tmp_path / "none")})


def test_the_profiles_interface_is_certain_only_on_a_node() -> None:
    cluster = {**ON_SLURM, "interface": "ib0"}
    assert len(warnings(network.judge(reached(), config(cluster=cluster), False, inside_job=False))) == 1
    (fault,) = faults(network.judge(reached(), config(cluster=cluster), False, inside_job=True))
    assert fault == "cluster.interface: this machine has no ib0; it has lo, eth0"


@pytest.mark.parametrize(
    ("image", "address"),
    [
        ("docker://nvcr.io/nvidia/tritonserver:22.08-py3", "https://nvcr.io/v2/"),
        ("docker://127.0.0.1:5000/triton:1", "https://127.0.0.1:5000/v2/"),
        ("docker://ubuntu:22.04", "https://registry-1.docker.io/v2/"),
        ("docker://someone/triton@sha256:" + "0" * 64, "https://registry-1.docker.io/v2/"),
        ("docker://no image's name", ""),
        ("/images/triton.sif", ""),
        ("oci-archive:/images/triton.tar", ""),
    ],
)
def test_which_registry_an_image_comes_from(image: str, address: str) -> None:
    assert network.registry_of(image, {}) == address


def test_a_registry_without_https_is_asked_as_the_fetch_asks_it() -> None:
    environ = {"APPTAINER_NOHTTPS": "1"}
    assert network.registry_of("docker://127.0.0.1:5000/triton:1", environ) == "http://127.0.0.1:5000/v2/"


def test_an_address_where_nobody_listens_is_told_from_one_that_answers() -> None:
    assert "refused" in network._reach("http://127.0.0.1:9/", None)


# Machine, Python, and what is named

HERE = MachineFacts("n1", "Linux", 64, 500, prefix="/nfs/me/venv", prefix_kind="nfs4", deepspeed="0.17.0")


def machine_with(**changes: object) -> MachineFacts:
    return MachineFacts(**{**vars(HERE), **changes})


def test_the_jobs_must_find_this_python() -> None:
    on_slurm = config(cluster=ON_SLURM)
    assert faults(machine.judge(HERE, on_slurm, 8)) == []
    (fault,) = faults(machine.judge(machine_with(prefix="/tmp/venv", prefix_kind="ext4"), on_slurm, 8))
    assert "/tmp/venv is on this machine alone" in fault
    (fault,) = faults(machine.judge(machine_with(base="/dev/shm/python"), on_slurm, 8))
    assert "/dev/shm/python is on this machine alone" in fault
    assert faults(machine.judge(machine_with(prefix="/tmp/venv"), config(), 0)) == []
    (fault,) = faults(machine.judge(machine_with(python=(3, 13, 0)), config(), 0))
    assert "Python 3.13.0: not one that the project runs on" in fault


def test_deepspeed_is_missed_only_where_the_training_uses_it() -> None:
    without = machine_with(deepspeed=None)
    assert len(faults(machine.judge(without, config(cluster=ON_SLURM), 8))) == 1
    assert faults(machine.judge(without, config("train.accelerate_config=ddp", cluster=ON_SLURM), 8)) == []
    assert faults(machine.judge(without, config(preset="demo"), 0)) == []
    inside = config(cluster={**ON_SLURM, "trainer_image": "trainer.sif"})
    assert faults(machine.judge(without, inside, 8)) == []
    assert faults(gpus.judge(GpuFacts(torch="2.13.0+cpu"), inside, "venv", {}, False)) == []
    (fault,) = faults(machine.judge(HERE, config("train.tracker=tensorboard"), 0))
    assert "tensorboard is not installed" in fault


def test_modules_and_image_files_are_tried(tmp_path: Path) -> None:
    cluster = {**ON_SLURM, "modules": ["no-such/1"], "trainer_image": str(tmp_path / "trainer.sif")}
    wanted = config(f"sandbox.image=oci-archive:{tmp_path}/triton.tar", cluster=cluster)
    found = faults(named.judge(named.probe(wanted, "apptainer"), wanted))
    assert [fault.split(":")[0] for fault in found] == ["cluster.modules", "sandbox.image", "cluster.trainer_image"]
    for name in ("trainer.sif", "triton.tar"):
        (tmp_path / name).touch()
    assert len(faults(named.judge(named.probe(wanted, "apptainer"), wanted))) == 1


# Asking and showing


def test_who_does_not_answer_does_not_hold_up_the_others() -> None:
    import threading

    never = threading.Event()
    assert together({"quick": lambda: True, "hung": never.wait}, deadline_s=0.2) == {"quick": True, "hung": None}
    assert ask(["sleep", "30"], timeout_s=0.1).status is None
    with pytest.raises(ZeroDivisionError):
        together({"broken": lambda: 1 / 0})


def test_the_table_fits_its_width_and_is_plain_where_nobody_reads_colours() -> None:
    findings = [
        Finding("GPUs", "ok", "fine", "never shown"),
        Finding("GPUs", "fail", "word " * 60, "remedy " * 40),
        Finding("Network", "unknown", "who knows"),
    ]
    text = render(findings, colour=False, width=100)
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    assert "never shown" not in text
    assert text.splitlines()[-1] == "1 will not work, 1 not known, 1 fine"
    assert "\x1b[31m✗" in render(findings, colour=True)
    assert (fails(findings), fails(findings[::2])) == (True, False)
