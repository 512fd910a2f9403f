# SPDX-License-Identifier: Apache-2.0
"""Logical volumes by their UUIDs: found whatever they are called, removed, renamed.

A volume that was removed and made again has the same name and another UUID. Checked with LVM
2.03.16.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.errors import ChainmergeError
from chainmerge.storage import lvm
from chainmerge.storage.volume_errors import LvmFailed, VolumeNotRemoved, VolumeNotRenamed
from chainmerge.storage.volume_names import mapper_name_in, volume_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from chainmerge.storage.lvm import VolumeUuids

_FIELDS: Final = "vg_name,vg_uuid,lv_name,lv_uuid,lv_attr"
# The first letter of lv_attr: a volume with LVM snapshots, which may be merging into it.
_ORIGINS: Final = ("o", "O")
_FOOTPRINT_FIELDS: Final = (
    "vg_uuid,lv_uuid,lv_name,lv_parent,origin,pool_lv,lv_size,lv_attr,lv_time"
)
# Else times, and the names of hidden volumes, are as the administrator likes them.
_AS_EXPECTED: Final = 'report/time_format="%s" report/mark_hidden_devices=1'
# The first letter of lv_attr: a volume whose blocks are those of a pool (thin, VDO).
_IN_A_POOL: Final = ("V", "v")


class KnownVolume(Struct, frozen=True):
    """A logical volume as LVM reports it now.

    Attributes:
        group: the name of its volume group.
        own_name: its name in the group.
        uuid: its UUID, with dashes.
        attributes: ``lv_attr``.
    """

    group: str
    own_name: str
    uuid: str
    attributes: str

    @property
    def name(self) -> str:
        """The argument by which LVM knows it."""
        return f"{self.group}/{self.own_name}"

    @property
    def path(self) -> Path:
        """What it is called wherever it is active."""
        return Path("/dev") / self.group / self.own_name

    @property
    def obstacle_to_removal(self) -> str | None:
        """Why it must not be removed, in words."""
        if self.attributes.startswith(_ORIGINS):
            return "it has LVM snapshots, which would be removed with it"
        return None


class Footprint(Struct, frozen=True):
    """What a logical volume takes of its volume group.

    Attributes:
        group: the UUID of the volume group, without dashes.
        size: bytes of it that are free once the volume is removed, those of copies, of parity and
            of a cache included. 0 for one whose blocks are those of a pool.
        is_in_a_pool: whether they are.
        made: when it was made, in seconds since 1970; None if LVM does not know. When it was
            written last, nothing tells.
    """

    group: str
    size: int
    is_in_a_pool: bool
    made: int | None


def lasting_path(path: Path) -> Path:
    """``/dev/GROUP/VOLUME`` of a path that leads to a logical volume; else the path itself.

    Where no udev makes such names, as in a container, that in ``/dev/mapper``. Raises OSError if
    there is nothing.
    """
    if not path.is_block_device():
        return path
    device = path.stat().st_rdev
    name = lvm.device_mapper_name(device)
    if name is None:
        return path
    for other in (volume_path(name.name), Path("/dev/mapper", name.name)):
        if other is not None and other.is_block_device() and other.stat().st_rdev == device:
            return other
    return path


def uuids_at(path: Path) -> VolumeUuids | None:
    """Those of the logical volume that a path leads to; None if it leads to something else."""
    try:
        name = lvm.device_mapper_name(path.stat().st_rdev) if path.is_block_device() else None
    except OSError:
        return None
    return None if name is None else name.uuids


def find_volume(image: str, uuids: VolumeUuids) -> KnownVolume | None:
    """The volume with these UUIDs; None if there is none any more.

    *image* is what messages call it.

    Raises:
        LvmMissing, LvmFailed: there is no report.
    """
    for row in lvm.rows_told(image, "lvs", *lvm.OF_ANY_HOST, "-o", _FIELDS):
        if _uuids_in(row) == uuids:
            return KnownVolume(row["vg_name"], row["lv_name"], row["lv_uuid"], row["lv_attr"])
    return None


def footprints(paths: Iterable[Path]) -> Mapping[Path, Footprint]:
    """Those of the logical volumes that some paths lead to, as far as LVM tells."""
    wanted = {path: uuids for path in paths if (uuids := uuids_at(path)) is not None}
    if not wanted:
        return {}
    arguments = ("-a", *lvm.OF_ANY_HOST, "--config", _AS_EXPECTED, "-o", _FOOTPRINT_FIELDS)
    try:
        rows = lvm.rows_told(str(next(iter(wanted))), "lvs", *arguments)
    except ChainmergeError:
        return {}
    by_uuids = {_uuids_in(row): row for row in rows}
    return {
        path: _footprint(by_uuids[uuids], rows)
        for path, uuids in wanted.items()
        if uuids in by_uuids
    }


def _uuids_in(row: Mapping[str, str]) -> VolumeUuids:
    group, volume = (row.get(name, "").replace("-", "") for name in ("vg_uuid", "lv_uuid"))
    return lvm.VolumeUuids(group, volume)


def _footprint(row: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> Footprint:
    made = row.get("lv_time", "")
    is_in_a_pool = row.get("lv_attr", "").startswith(_IN_A_POOL)
    return Footprint(
        _uuids_in(row).group,
        0 if is_in_a_pool else _extents_below(row, rows),
        is_in_a_pool,
        int(made) if made.isdecimal() else None,
    )


def _extents_below(row: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> int:
    """Bytes of a volume group that a volume takes: those of its parts, where it has any."""
    parts = [one for one in rows if _is_part(one, row)]
    if parts:
        return sum(_extents_below(part, rows) for part in parts)
    size = row.get("lv_size", "")
    return int(size) if size.isdecimal() else 0


def _is_part(row: Mapping[str, str], whole: Mapping[str, str]) -> bool:
    """Whether a hidden volume, whose name is in brackets, is a part of another one.

    What a cached volume consists of does not name it as its parent.
    """
    name = row.get("lv_name", "")
    if row.get("vg_uuid") != whole.get("vg_uuid") or not name.startswith("["):
        return False
    named = {whole.get("origin"), whole.get("pool_lv")}
    return name in named or row.get("lv_parent", "") == whole.get("lv_name")


def is_name_taken(image: str, path: Path) -> bool:
    """Whether LVM has a volume of the name that *path* spells, active or not.

    *image* is what messages call it.

    Raises:
        LvmMissing, LvmFailed: there is no report.
    """
    wanted = mapper_name_in(path)
    rows = lvm.rows_told(image, "lvs", *lvm.OF_ANY_HOST, "-o", "vg_name,lv_name")
    return any(
        mapper_name_in(Path("/dev", row["vg_name"], row["lv_name"])) == wanted for row in rows
    )


def remove_volume(image: str, uuids: VolumeUuids) -> bool:
    """Remove the volume with these UUIDs, durably, and no other one of its name.

    Returns:
        Whether there was one.

    Raises:
        VolumeNotRemoved: it is still there.
        LvmMissing, LvmFailed: nobody knows whether it is.
        LvmUnfinished: it may be removed yet.
        CannotOpen, FlushFailed: it is removed, and may be there again after a power cut.
    """
    volume = find_volume(image, uuids)
    if volume is None:
        return False
    if volume.obstacle_to_removal is not None:
        raise VolumeNotRemoved(str(volume.path), volume.obstacle_to_removal)
    reason = "lvm says nothing of it"
    try:
        # By both: under its name there could be another one by now. -y answers the question
        # whether an active volume may be removed; one that is open is not.
        lvm.run_command(image, "lvremove", "-y", "-S", f"lv_uuid={volume.uuid}", "--", volume.name)
    except LvmFailed as error:
        reason = error.reason
    if find_volume(image, uuids) is not None:
        raise VolumeNotRemoved(str(volume.path), reason)
    lvm.make_metadata_durable(image, volume.group)
    return True


def rename_volume(image: str, uuids: VolumeUuids, own_name: str) -> bool:
    """Give the volume with these UUIDs another name in its group, durably.

    lvrename knows a volume by its name alone, so the caller has it open: as long as it is, nobody
    can remove it and make another one of its name.

    Returns:
        Whether it had another one.

    Raises:
        VolumeNotRenamed: it has not got the name.
        LvmMissing, LvmFailed: nobody knows whether it has.
        LvmUnfinished: it may get it yet.
        CannotOpen, FlushFailed: it has it, and may have the old one after a power cut.
    """
    volume = find_volume(image, uuids)
    if volume is None:
        raise VolumeNotRenamed(image, own_name, "lvm does not know the volume any more")
    if volume.own_name == own_name:
        return False
    reason = "lvm says nothing of it"
    try:
        lvm.run_command(image, "lvrename", "--", volume.group, volume.own_name, own_name)
    except LvmFailed as error:
        reason = error.reason
    renamed = find_volume(image, uuids)
    if renamed is None or renamed.own_name != own_name:
        raise VolumeNotRenamed(str(volume.path), own_name, reason)
    lvm.make_metadata_durable(image, volume.group)
    return True
