# SPDX-License-Identifier: Apache-2.0
"""Keeps other hosts from using the volumes that are going to be written to.

QEMU's locks on a block device are known to one kernel only. LVM tells whether a volume group is
shared between hosts, and whether this one holds a volume for itself alone. What lies in files is
not looked at: locks on them reach as far as the file system takes them.
"""

from __future__ import annotations

import contextlib
import stat
from typing import TYPE_CHECKING

from chainmerge.storage import lvm
from chainmerge.storage.volume_errors import VolumeShared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from chainmerge.options import Access

_OR_BY_SITE = "or give the command by which your site locks volumes (--lock-command)"


@contextlib.contextmanager
def held_by_this_host(
    images: Iterable[Path], access: Access, goes_on: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Have the volumes of *images*, which are going to be written to, for this host alone.

    *goes_on* is asked when the block ends with an error: whether another process writes to them
    still.

    Raises:
        VolumeShared: another host may use one of them.
        LvmMissing, NotALogicalVolume: LVM does not tell.
        VolumeNotGranted: the site's command does not lock them.
        VolumeNotGivenBack: it does not unlock them at the end.
    """
    wanted = tuple(images)
    for refusal in shared_volumes(wanted, access):
        raise refusal
    volumes = [_lasting_path(image) for image in _devices(wanted)]
    if access.lock_command is None or not volumes:
        yield
        return
    # Imported where it is used: most images lie in files.
    from chainmerge.storage.site_lock import locked_by_site  # noqa: PLC0415

    with locked_by_site(access.lock_command, volumes, goes_on):
        yield


def shared_volumes(images: Iterable[Path], access: Access) -> Iterator[VolumeShared]:
    """Why *images* must not be written to: their volumes may be in use by another host.

    The site's lock command, where there is one, is what says so.

    Raises:
        LvmMissing, NotALogicalVolume: LVM does not tell.
    """
    if access.lock_command is not None:
        return
    for image in _devices(images):
        name = lvm.device_mapper_name(image.stat().st_rdev)
        if name is None:
            continue
        sharing = lvm.sharing_of(str(image), name)
        # Few hosts have one, and it takes another process to know.
        own_id = lvm.system_id(str(image)) if sharing.owner else ""
        refusal = _refusal(str(image), sharing, own_id)
        if refusal is not None:
            yield refusal


def _devices(images: Iterable[Path]) -> Iterator[Path]:
    """Those images that are block devices; what cannot be looked at is refused elsewhere."""
    for image in dict.fromkeys(images):
        with contextlib.suppress(OSError, ValueError):
            if stat.S_ISBLK(image.stat().st_mode):
                yield image


def _lasting_path(device: Path) -> str:
    """What every host, and the next boot, calls a logical volume; else what it was called here."""
    name = lvm.device_mapper_name(device.stat().st_rdev)
    return str(device.absolute()) if name is None else f"/dev/mapper/{name.name}"


def _refusal(image: str, sharing: lvm.VolumeSharing, own_id: str) -> VolumeShared | None:
    """The rule: what another host may use is written to only by the host that holds it."""
    group = sharing.vg_name
    if sharing.owner and sharing.owner != own_id:
        own = f"this one's is {own_id!r}" if own_id else "this one has none"
        reason = f"belongs to another host (its system ID is {sharing.owner!r}, {own})"
        remedy = (
            f"run the command on the host {sharing.owner!r}, or have it hand the group over "
            f"('vgchange --systemid ID {group}' there, with the ID that 'lvm systemid' prints "
            f"here), {_OR_BY_SITE}"
        )
        return VolumeShared(image, group, reason, remedy)
    if sharing.exclusive or not sharing.locking:
        return None
    shared = f"is shared between hosts (lock type {sharing.locking})"
    if not sharing.is_told:
        reason = f"{shared}, and this lvm cannot tell whether this host alone has the volume"
        remedy = f"update lvm2 (lvmlockd is asked by 2.03.18 and later), {_OR_BY_SITE}"
        return VolumeShared(image, group, reason, remedy)
    reason = f"{shared}, and this host does not hold the volume exclusively"
    remedy = (
        f"let this host hold it exclusively ('lvchange -aey {sharing.name}', which fails while "
        f"another host has it active), {_OR_BY_SITE}"
    )
    return VolumeShared(image, group, reason, remedy)
