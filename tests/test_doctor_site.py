"""What the doctor makes of recorded facts of machines, engines, folders, networks and GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import load
from pipeline.config.schema import Config
from pipeline.run.directory import RunDir
from pipeline.site import engine, folders, gpus, machine, named, network, storage
from pipeline.site.ask import Answer, ask, together
from pipeline.site.engine import EngineFacts
from pipeline.site.findings import Finding, fails, render
from pipeline.site.folders import Use
from pipeline.site.gpus import Gpu, GpuFacts
from pipeline.site.images import driver_fits, needs_of, release_of
from pipeline.site.machine import MachineFacts
from pipeline.site.network import NetworkFacts
from pipeline.site.storage import GIB, Folder

ON_SLURM = {"name": "site", "executor": "slurm", "stages": {"train": {"gpus": 8}}}
APPTAINER = Answer(0, "apptainer version 1.4.5\n")
YES, NO = Answer(0, ""), Answer(1, "unshare: unshare failed: Operation not permitted\n")


def config(*overrides: str, preset: str = "gptj", cluster: dict[str, object] | None = None) -> Config:
    tree = load.load_preset(preset)
    return load.resolve({**tree, "cluster": cluster} if cluster else tree, overrides)


def faults(findings: list[Finding]) -> list[str]:
    return [each.what for each in findings if each.level == "fail"]


def warnings(findings: list[Finding]) -> list[str]:
    return [each.what for each in findings if each.level == "warn"]


# Engines


def test_docker_without_its_daemon_is_a_fault_and_what_would_work_is_named() -> None:
    down = Answer(1, "Cannot connect to the Docker daemon at unix:///var/run/docker.sock.")
    facts = EngineFacts({"docker": Answer(0, "Docker version 28.2.2, build e6534b4")}, docker=down, libc="glibc 2.36")
    findings = engine.judge(facts, config())
    assert faults(findings) == [f"docker (found by sandbox.engine: auto): its daemon cannot be used: {down.text}"]
    assert findings[-1].what == "this would work instead: venv (cluster.engine, sandbox.engine)"


def test_apptainer_needs_user_namespaces_or_a_setuid_starter() -> None:
    facts = EngineFacts({"apptainer": APPTAINER}, user_namespaces=YES, fuse=True, subuid=True)
    assert {each.level for each in engine.judge(facts, config())} == {"ok"}
    facts = EngineFacts({"apptainer": APPTAINER}, user_namespaces=NO, setuid=("apptainer",))
    assert faults(engine.judge(facts, config())) == []
    assert len(warnings(engine.judge(facts, config()))) == 1
    facts = EngineFacts({"apptainer": APPTAINER}, user_namespaces=NO, fuse=True)
    (fault,) = faults(engine.judge(facts, config()))
    assert "can make no user namespace (unshare: unshare failed: Operation not permitted)" in fault
    forbidden = replace(facts, restriction="user.max_user_namespaces = 0")
    (fault,) = faults(engine.judge(forbidden, config()))
    assert "can make no user namespace (user.max_user_namespaces = 0), and there is no setuid starter" in fault
    apparmor = replace(facts, restriction="kernel.apparmor_restrict_unprivileged_userns = 1")
    assert faults(engine.judge(apparmor, config())) == []  # the engine's own profile may allow it
    assert len(warnings(engine.judge(apparmor, config()))) == 1


def test_an_engine_that_the_profile_names_and_this_machine_lacks() -> None:
    wanted = config(cluster={**ON_SLURM, "engine": "singularity"})
    findings = engine.judge(EngineFacts({"apptainer": APPTAINER}, user_namespaces=YES, fuse=True), wanted)
    assert faults(findings) == []  # jobs may have it
    assert warnings(findings) == ["singularity (cluster.engine): not on PATH here"]
    facts = EngineFacts({"apptainer": APPTAINER}, user_namespaces=YES, fuse=True)
    findings = engine.judge(facts, wanted, inside_job=True)
    assert faults(findings) == ["singularity (cluster.engine): not on PATH here"]
    assert "apptainer, venv" in findings[-1].what
    findings = engine.judge(facts, config("sandbox.engine=singularity"))
    assert faults(findings) == ["singularity (sandbox.engine): not on PATH here"]


def test_a_sif_needs_fuse_and_a_sandbox_does_not() -> None:
    facts = EngineFacts({"apptainer": APPTAINER}, user_namespaces=YES)
    (warning,) = warnings(engine.judge(facts, config()))
    assert "no squashfuse, or no access to /dev/fuse" in warning
    assert warnings(engine.judge(facts, config("sandbox.format=sandbox"))) == []


def test_the_venv_engine_needs_a_python_and_a_libc_that_suit_it() -> None:
    demo = config(preset="demo")
    assert faults(engine.judge(EngineFacts(libc="glibc 2.36"), demo)) == []
    (fault,) = faults(engine.judge(EngineFacts(libc="glibc 2.28"), demo))
    assert "needs glibc 2.35, and this machine has glibc 2.28" in fault
    (fault,) = faults(engine.judge(EngineFacts(venv_fault="sandbox: libpython3.11.so.1.0 not found"), demo))
    assert "libpython3.11.so.1.0 not found" in fault


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("apptainer version 1.4.5", (1, 4, 5)),
        ("singularity-ce version 4.1.2-jammy", (4, 1, 2)),
        ("singularity version 3.8.7", (3, 8, 7)),
        ("nothing", ()),
    ],
)
def test_engines_versions(text: str, expected: tuple[int, ...]) -> None:
    assert engine.version(text) == expected


# GPUs and images

A100 = Gpu("0", "NVIDIA A100-SXM4-80GB", (470, 57, 2), 81920, mig=False, capability=(8, 0))
H100 = Gpu("0", "NVIDIA H100 80GB HBM3", (535, 129, 3), 81559, mig=False, capability=(9, 0))


def seen(gpu: Gpu, count: int = 8, torch_cuda: str | None = "12.8") -> GpuFacts:
    return GpuFacts((gpu,) * count, torch="2.8.0+cu128", torch_cuda=torch_cuda)


def test_nvidia_smis_table_is_read_with_and_without_capabilities() -> None:
    listing = Answer(0, "0, NVIDIA A100-SXM4-80GB, 470.57.02, 81920, Disabled\n1, Tesla T4, 470.57.02, 15109, [N/A]\n")
    found, fault = gpus.read({"gpus": listing, "capability": Answer(0, "8.0\n7.5\n")})
    assert fault is None
    assert found[0] == A100
    assert (found[1].capability, found[1].mig) == ((7, 5), False)
    old, _ = gpus.read({"gpus": listing, "capability": Answer(2, 'Field "compute_cap" is not a valid field to query.')})
    assert [gpu.capability for gpu in old] == [None, None]
    broken = Answer(9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")
    assert gpus.read({"gpus": broken, "capability": broken}) == ((), broken.text)
    absent = ask(["surely-no-such-command"])
    assert gpus.read({"gpus": absent, "capability": absent}) == ((), None)


@pytest.mark.parametrize(
    ("image", "driver", "gpu", "fits"),
    [
        ("22.08", (515, 43), "NVIDIA GeForce RTX 3090", True),
        ("22.08", (470, 57, 2), "NVIDIA A100-SXM4-80GB", True),
        ("22.08", (470, 57, 2), "NVIDIA GeForce RTX 3090", False),  # compatibility libraries: data centre GPUs only
        ("22.08", (460, 91), "NVIDIA A100-SXM4-80GB", False),
        ("24.04", (535, 129), "NVIDIA H100 80GB HBM3", True),
        ("24.04", (535, 54), "NVIDIA H100 80GB HBM3", False),  # before 535.86
        ("26.07", (580, 65), "NVIDIA GeForce RTX 4090", True),
        ("26.07", (560, 35), "NVIDIA A100-SXM4-80GB", False),
        ("26.07", (570, 86), "NVIDIA A100-SXM4-80GB", True),
    ],
)
def test_which_driver_an_image_runs_with(image: str, driver: tuple[int, ...], gpu: str, fits: bool) -> None:
    release = release_of(f"docker://nvcr.io/nvidia/tritonserver:{image}-pyt-python-py3")
    assert release is not None
    needs = needs_of(release)
    assert needs is not None
    assert driver_fits(driver, gpu, needs) is fits


def test_the_image_against_the_gpus_of_this_machine() -> None:
    old = config("sandbox.image=docker://nvcr.io/nvidia/tritonserver:22.08-py3")
    new = config("sandbox.image=docker://nvcr.io/nvidia/tritonserver:26.07-py3")

    def image_faults(config: Config, gpu: Gpu, engine: str = "apptainer") -> list[str]:
        return [fault for fault in faults(gpus.judge(seen(gpu), config, engine, {}, False)) if "sandbox.image" in fault]

    assert image_faults(old, A100) == []
    (fault,) = image_faults(old, H100)
    assert "tritonserver:22.08-py3 does not know NVIDIA H100 80GB HBM3 (compute capability 9.0; up to 8.7)" in fault
    assert image_faults(new, H100) == []
    (fault,) = image_faults(new, A100)
    assert "(CUDA 13.0) needs driver 580, and this one is 470.57.2" in fault
    assert image_faults(new, A100, engine="venv") == []


def test_the_image_against_the_gpus_that_slurm_names() -> None:
    old = config("sandbox.image=docker://nvcr.io/nvidia/tritonserver:22.08-py3", cluster=ON_SLURM)
    facts = GpuFacts(torch="2.8.0", torch_cuda="12.8")
    (fault,) = faults(gpus.judge(facts, old, "apptainer", {"a100": 8, "nvidia_h100_80gb_hbm3": 4}, False))
    assert "does not know nvidia_h100_80gb_hbm3" in fault
    picked = config(*("sandbox.image=" + old.sandbox.image,), cluster={**ON_SLURM, "gpu_type": "a100"})
    assert faults(gpus.judge(facts, picked, "apptainer", {"a100": 8, "nvidia_h100_80gb_hbm3": 4}, False)) == []


def test_torchs_build_against_gpus_and_driver() -> None:
    cpu = GpuFacts(torch="2.13.0+cpu")
    assert faults(gpus.judge(cpu, config(cluster=ON_SLURM), "venv", {}, False)) == [
        "torch 2.13.0+cpu is a CPU build: the GPUs would lie idle"
    ]
    assert faults(gpus.judge(cpu, config(preset="demo"), "venv", {}, False)) == []
    (fault,) = faults(gpus.judge(seen(A100, torch_cuda="13.0"), config(), "venv", {}, False))
    assert "(CUDA 13.0) needs driver 580 or later, and this one is 470.57.2" in fault


def test_no_gpu_matters_to_large_models_on_this_machine_only() -> None:
    none = GpuFacts(torch="2.13.0+cpu")
    assert faults(gpus.judge(none, config(), "venv", {}, False)) == [
        "none here: EleutherAI/gpt-j-6B would train on CPUs"
    ]
    assert faults(gpus.judge(none, config(preset="demo"), "venv", {}, False)) == []
    cuda = GpuFacts(torch="2.8.0", torch_cuda="12.8")
    assert faults(gpus.judge(cuda, config(cluster=ON_SLURM), "venv", {}, False)) == []


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
