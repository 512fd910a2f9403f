# SPDX-License-Identifier: Apache-2.0
"""A storage has the same name for all that lies on it, and another one has another."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from chainmerge.storage import storage_names
from chainmerge.storage.mounts import MountedFrom, mounted_from
from chainmerge.storage.storage_names import storage_name
from tests.support import loopdev, machine
from tests.support.images import MIB

if TYPE_CHECKING:
    from pathlib import Path

TABLE = rb"""22 1 254:0 / / rw,relatime - ext4 /dev/vda1 rw
23 22 0:21 / /proc rw,nosuid shared:3 - proc proc rw
30 22 0:40 / /mnt/nfs\040share rw,relatime shared:1 master:2 - nfs4 server:/a\040b rw,addr=10.0.0.1
31 22 0:50 / /mnt/old rw - xfs /dev/sdb rw
32 22 0:51 / /mnt/old rw - btrfs /dev/sdc rw
33 22 0:52 / /mnt/odd rw
"""


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/images/a", MountedFrom("ext4", "/dev/vda1")),
        ("/", MountedFrom("ext4", "/dev/vda1")),
        ("/proc/1", MountedFrom("proc", "proc")),
        ("/mnt/nfs share/x/y", MountedFrom("nfs4", "server:/a b")),
        ("/mnt/old/x", MountedFrom("btrfs", "/dev/sdc")),
        ("/mnt/older", MountedFrom("ext4", "/dev/vda1")),
        ("/mnt/odd/x", None),
    ],
)
def test_what_a_path_is_mounted_from(tmp_path: Path, path: str, found: MountedFrom | None) -> None:
    table = tmp_path / "mountinfo"
    table.write_bytes(TABLE)
    assert mounted_from(path, table) == found
    assert mounted_from(path, tmp_path / "none") is None


def test_files_of_a_file_system(tmp_path: Path) -> None:
    file = tmp_path / "image"
    file.write_bytes(b"x")
    assert storage_name(file) == storage_name(tmp_path) is not None
    assert storage_name(tmp_path) != storage_name("/proc")
    assert storage_name(tmp_path / "none") is None


def test_a_device_by_its_uuid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not machine.has_loop_devices():
        pytest.skip("needs loop devices")
    with loopdev.loop_device(tmp_path / "disk", 64 * MIB) as device:
        links = tmp_path / "by-uuid"
        links.mkdir()
        monkeypatch.setattr(storage_names, "_BY_UUID", links)
        mounted = MountedFrom("xfs", str(device))
        assert storage_names._name_of_file_system(mounted) == f"xfs {device}"
        (links / "dangling").symlink_to("/nothing")
        (links / "1234-abcd").symlink_to(device)
        assert storage_names._name_of_file_system(mounted) == "xfs UUID=1234-abcd"
        assert storage_name(device) == f"disk {device.name}"


@pytest.mark.parametrize(
    ("place", "said", "name"),
    [
        ("dm/uuid", f"LVM-{'a' * 32}{'b' * 32}", f"lvm {'a' * 32}"),
        ("dm/uuid", "mpath-3600", "mapped mpath-3600"),
        ("wwid", "eui.0025", "disk eui.0025"),
        ("serial", "  WD  1 ", "disk WD 1"),
        ("device/wwid", "naa.5000", "disk naa.5000"),
        ("size", "1", "disk 7:3"),
    ],
)
def test_what_devices_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, said: str, name: str
) -> None:
    file = tmp_path / "7:3" / place
    file.parent.mkdir(parents=True)
    file.write_text(said)
    monkeypatch.setattr(storage_names, "_BLOCK_DEVICES", tmp_path)
    assert storage_names._name_of_device(os.makedev(7, 3)) == name


def test_a_partition_is_on_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partition = tmp_path / "sys" / "sda" / "sda1"
    partition.mkdir(parents=True)
    (partition / "partition").write_text("1")
    (partition.parent / "wwid").write_text("naa.1")
    places = tmp_path / "block"
    places.mkdir()
    (places / "8:1").symlink_to(partition)
    monkeypatch.setattr(storage_names, "_BLOCK_DEVICES", places)
    assert storage_names._name_of_device(os.makedev(8, 1)) == "disk naa.1"
