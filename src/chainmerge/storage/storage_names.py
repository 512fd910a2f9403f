# SPDX-License-Identifier: Apache-2.0
"""What storage an image lies on, by a name that stays the same after the next boot.

A file system is named by its kind and by the UUID of what it is mounted from, or by that source
where nothing has a UUID (NFS, tmpfs). A logical volume is named by the UUID of its volume group:
volumes of one group share its disks. Another device is named by what its disk calls itself. Numbers
of devices, which the kernel gives anew at every boot, are used only where there is nothing else.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from chainmerge.storage.mounts import MountedFrom, mounted_from

_BY_UUID: Final = Path("/dev/disk/by-uuid")
_BLOCK_DEVICES: Final = Path("/sys/dev/block")
_OF_LVM: Final = "LVM-"
_UUID_OF_LVM: Final = 32
_CALLED_BY_ITSELF: Final = ("wwid", "device/wwid", "serial", "device/serial")


def storage_name(path: str | Path) -> str | None:
    """The storage of a file, a directory or a device; None if it cannot be found out."""
    try:
        status = os.stat(path)  # noqa: PTH116 (there are many)
        if stat.S_ISBLK(status.st_mode):
            return _name_of_device(status.st_rdev)
        mounted = mounted_from(os.path.realpath(path))
    except (OSError, ValueError):
        return None
    return None if mounted is None else _name_of_file_system(mounted)


def _name_of_file_system(mounted: MountedFrom) -> str:
    uuid = _uuid_of(mounted.source) if mounted.source.startswith("/dev/") else None
    return f"{mounted.kind} {mounted.source if uuid is None else f'UUID={uuid}'}"


def _uuid_of(node: str) -> str | None:
    try:
        device = os.stat(node).st_rdev  # noqa: PTH116
        links = sorted(_BY_UUID.iterdir())
    except OSError:
        return None
    for link in links:
        try:
            if link.stat().st_rdev == device:
                return link.name
        except OSError:
            continue
    return None


def _name_of_device(device: int) -> str:
    place = _BLOCK_DEVICES / f"{os.major(device)}:{os.minor(device)}"
    mapped = _said_in(place / "dm" / "uuid")
    if mapped is not None:
        if mapped.startswith(_OF_LVM):
            return f"lvm {mapped[len(_OF_LVM) : len(_OF_LVM) + _UUID_OF_LVM]}"
        return f"mapped {mapped}"
    disk = place.resolve()
    if (disk / "partition").exists():
        disk = disk.parent
    for name in _CALLED_BY_ITSELF:
        said = _said_in(disk / name)
        if said is not None:
            return f"disk {said}"
    return f"disk {disk.name}"


def _said_in(file: Path) -> str | None:
    try:
        return " ".join(file.read_text(encoding="utf-8", errors="replace").split()) or None
    except OSError:
        return None
