# SPDX-License-Identifier: Apache-2.0
"""What logical volumes are called under /dev."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainmerge.storage.volume_names import mapper_name_in, volume_path

# lvm(8): no name of a volume begins with a dash, nor one of a group.
NAMES = st.from_regex(r"[a-zA-Z0-9+_.][a-zA-Z0-9+_.-]{0,20}", fullmatch=True).filter(
    lambda name: name not in (".", "..", "mapper") and not name.startswith(".")
)


@given(group=NAMES, volume=NAMES)
def test_both_names_mean_the_same(group: str, volume: str) -> None:
    path = Path("/dev", group, volume)
    name = mapper_name_in(path)
    if group in ("disk", "block", "char", "shm", "mqueue", "pts", "fd"):
        assert name is None
        return
    assert name is not None
    assert volume_path(name) == path
    assert mapper_name_in(Path("/dev/mapper", name)) == name


@pytest.mark.parametrize(
    "path",
    [
        "/dev/loop3", "/dev/dm-5", "/dev/disk/by-id/x", "/dev/mapper/control", "/dev/shm/image",
        "/srv/images/top.qcow2", "/dev", "/", "/dev/vg/place/top", "/device/vg/top",
    ],
)  # fmt: skip
def test_what_is_called_otherwise(path: str) -> None:
    assert mapper_name_in(Path(path)) is None


def test_dashes_are_told_apart() -> None:
    assert volume_path("a---b") == Path("/dev/a-/b")
    assert volume_path("vm--group-snap_vm--100--disk--0_s1.qcow2") == Path(
        "/dev/vm-group/snap_vm-100-disk-0_s1.qcow2"
    )
    assert volume_path("crypt") is None
