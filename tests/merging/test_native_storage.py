# SPDX-License-Identifier: Apache-2.0
"""Native merges on the storage that there is: devices full of old bytes, shared extents."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

import chainmerge
from chainmerge.options import Access, DataChoice, DirectionChoice, MergeOptions
from tests.support import qemu
from tests.support.images import MIB
from tests.support.loopdev import loop_device, mounted_file_system

if TYPE_CHECKING:
    from pathlib import Path

DISK = 64 * MIB
GEOMETRIES: dict[str, dict[str, Any]] = {
    "512 B": {"cluster_size": 512},
    "4 KiB": {"cluster_size": 4096},
    "64 KiB": {"cluster_size": 65536},
    "subclusters": {"cluster_size": 131072, "extended_l2": "on"},
}


def put(device: Path, image: Path) -> None:
    """Write an image to a device that somebody else has used before."""
    device.write_bytes(b"\xaa" * (96 * MIB))
    fd = os.open(device, os.O_RDWR)
    try:
        os.pwrite(fd, image.read_bytes(), 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize("data", ["cow", "in-place"])
@pytest.mark.parametrize("direction", ["commit", "pull"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_devices_that_are_full_of_old_bytes(
    tmp_path: Path, geometry: str, direction: DirectionChoice, data: DataChoice, sector_size: int
) -> None:
    options, other = GEOMETRIES[geometry], tmp_path / "other.qcow2"
    with loop_device(tmp_path / "behind", 96 * MIB, sector_size=sector_size) as device:
        base, top = (device, other) if direction == "commit" else (other, device)
        if direction == "commit":
            put(base, qemu.create(tmp_path / "fresh", DISK, **options))
        else:
            qemu.create(base, DISK)
        qemu.qemu_io(base, "write -P 1 0 3M", "write -P 2 20M 1M")
        if direction == "commit":
            qemu.create(top, DISK, backing=base)
        else:
            put(top, qemu.create(tmp_path / "fresh", DISK, backing=base, **options))
        qemu.qemu_io(top, "write -P 3 1M 1M", "write -P 4 30M 3k", "write -z 2500k 1M")
        expected = qemu.content(top)
        access = Access(allow_backing=("/dev", str(tmp_path)), search=(str(tmp_path),))
        merge = MergeOptions(engine="native", direction=direction, data=data)
        chainmerge.merge(top, access=access, options=merge)
        qemu.assert_clean(device)
        assert qemu.content(device) == expected


@pytest.mark.parametrize("direction", ["commit", "pull"])
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_what_the_file_system_can_share_takes_no_space(
    tmp_path: Path, kind: str, direction: DirectionChoice
) -> None:
    """128 MiB are merged where there is room for half of them."""
    with mounted_file_system(tmp_path, kind, 512 * MIB) as mounted:
        base = qemu.create(mounted / "base.qcow2", 512 * MIB)
        top = qemu.create(mounted / "top.qcow2", backing="base.qcow2")
        written, other = (top, base) if direction == "commit" else (base, top)
        qemu.qemu_io(written, *(f"write -P {number + 1} {number * 8}M 4M" for number in range(32)))
        qemu.qemu_io(other, "write -P 99 1M 64k")
        expected = qemu.content(top)
        os.sync()
        free = os.statvfs(mounted).f_bavail * os.statvfs(mounted).f_frsize
        with (mounted / "ballast").open("wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, free - 64 * MIB)
        report = chainmerge.merge(top, options=MergeOptions(direction=direction, data="in-place"))
        assert report.bytes_copied >= 120 * MIB
        result = base if direction == "commit" else top
        qemu.assert_clean(result)
        assert qemu.content(result) == expected
