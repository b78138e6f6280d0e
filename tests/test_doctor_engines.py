"""What the doctor makes of recorded facts of container engines, GPUs, drivers and images."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers_doctor import ON_SLURM, config, faults, warnings

from pipeline.config.schema import Config
from pipeline.site import engine, gpus
from pipeline.site.ask import Answer, ask
from pipeline.site.engine import EngineFacts
from pipeline.site.gpus import Gpu, GpuFacts
from pipeline.site.images import driver_fits, needs_of, release_of

APPTAINER = Answer(0, "apptainer version 1.4.5\n")
YES, NO = Answer(0, ""), Answer(1, "unshare: unshare failed: Operation not permitted\n")


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
