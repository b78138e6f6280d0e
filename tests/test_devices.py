"""The last visible GPU serves, whatever the devices are called."""

from __future__ import annotations

import pytest

from pipeline.stages.devices import split_devices, visible_devices


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


def test_the_list_is_sliced_and_not_the_numbers() -> None:
    assert split_devices(tuple("01234567")) == (tuple("0123456"), ("7",))
    assert split_devices(("3", "5")) == (("3",), ("5",))
    assert split_devices(("4",)) == (("4",), ("4",))  # one GPU is shared
    assert split_devices(()) == ((), ())
