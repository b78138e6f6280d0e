"""The last visible GPU serves, whatever the devices are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.cluster import Cluster
from pipeline.errors import UserError
from pipeline.stages.devices import granted_devices, named_devices, split_devices, visible_devices


@pytest.mark.parametrize(
    ("listed", "devices"),
    [
        ("0,1,2,3,4,5,6,7", tuple("01234567")),
        ("3,4,5", ("3", "4", "5")),
        ("GPU-1b2c, GPU-9f8e", ("GPU-1b2c", "GPU-9f8e")),
        ("MIG-a,MIG-b", ("MIG-a", "MIG-b")),
        ("2,-1,3", ("2",)),  # CUDA stops at the first invalid entry
        ("NoDevFiles", ()),
        ("", ()),
    ],
)
def test_the_visible_list_is_read_as_cuda_reads_it(listed: str, devices: tuple[str, ...]) -> None:
    assert visible_devices({"CUDA_VISIBLE_DEVICES": listed}) == devices


def test_gpus_that_a_person_names_must_be_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert named_devices("", "--devices") == ()
    with pytest.raises(UserError, match=r"^--devices: a,b: this machine shows no GPU"):
        named_devices("a,b", "--devices")
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n[ \"$*\" = -L ] && echo '{LISTED}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert named_devices("1, 0", "--devices") == ("1", "0")
    assert named_devices("GPU-1b,MIG-77aa", "--devices") == ("GPU-1b", "MIG-77aa")
    for listed, bad in {"a,b": "a", "0,2": "2", "0,": "", "GPU-1c": "GPU-1c", "G": "G", "-1": "-1"}.items():
        with pytest.raises(UserError, match=rf"^--devices: no GPU here is called '{bad}'; there are: 0, 1, GPU-1b2c, "):
            named_devices(listed, "--devices")


LISTED = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1b2c)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-9f8e)
  MIG 1g.10gb     Device  0: (UUID: MIG-77aa)"""


def test_the_list_is_sliced_and_not_the_numbers() -> None:
    assert split_devices(tuple("01234567")) == (tuple("0123456"), ("7",))
    assert split_devices(("3", "5")) == (("3",), ("5",))
    assert split_devices(("4",)) == (("4",), ("4",))  # one GPU is shared
    assert split_devices(()) == ((), ())


def test_a_job_of_the_cluster_must_see_as_many_gpus_as_it_asked_for() -> None:
    stages = {"train": {"gpus": 4}, "serve": {"gpus": 1}}
    cluster = Cluster.model_validate({"name": "site", "executor": "slurm", "stages": stages})
    four = {"CUDA_VISIBLE_DEVICES": "3,4,5,6", "SLURMD_NODENAME": "node7"}
    assert granted_devices(cluster, ("serve", "train"), four) == ("3", "4", "5", "6")
    assert granted_devices(cluster, ("sft",), {"CUDA_VISIBLE_DEVICES": ""}) == ()
    with pytest.raises(UserError, match=r"^node7: 2 GPUs visible, 4 asked for .*'3,4'.* gpus of train in profile site"):
        granted_devices(cluster, ("serve", "train"), {**four, "CUDA_VISIBLE_DEVICES": "3,4"})
    here = Cluster.model_validate({"stages": stages})  # local jobs take what there is
    assert granted_devices(here, ("train",), {"CUDA_VISIBLE_DEVICES": "0"}) == ("0",)
