# SPDX-License-Identifier: Apache-2.0
"""Logical volumes, through the ``lvm`` command.

Checked with LVM 2.03.16 (Debian 12), whose JSON reports have every value as a string; later
ones can have numbers (``json_std``), and both are read. All sizes are in bytes.
"""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from chainmerge.arithmetic.rounding import divide_up, round_up
from chainmerge.storage.errors import CannotOpen, FlushFailed, reason_of
from chainmerge.storage.volume_errors import LvmFailed, LvmUnfinished, NotALogicalVolume

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_REPORT: Final = ("--reportformat", "json", "--units", "b", "--nosuffix")
# Without these, lvm leaves out groups of other hosts, and shared ones if lvmlockd is not up.
OF_ANY_HOST: Final = ("--foreign", "--shared")
_FIELDS: Final = (
    "vg_name", "vg_uuid", "lv_name", "lv_uuid", "lv_size", "vg_extent_size", "vg_free",
    "segtype", "stripes", "seg_start", "pool_lv",
)  # fmt: skip

# "vg_all" are the fields that this lvm knows: an old one refuses the names of those it does not.
_SHARING_FIELDS: Final = "lv_uuid,lv_name,lv_active_exclusively,vg_all"
_CLVM: Final = "clvm"
_WITHOUT_CLVMD: Final = (2, 3)
_ASKS_LVMLOCKD: Final = (2, 3, 18)
_SYSTEM_ID_LABEL: Final = "system ID:"

# The types that lvextend (2.03.16) enlarges by taking free extents of the volume group and nothing
# else, and how many of so many stripes hold data of their own. Of a cached volume LVM does not say
# what its origin is; one on several stripes takes more than is counted, and lvextend refuses that.
_DATA_STRIPES: Final[Mapping[str, Callable[[int], int]]] = MappingProxyType(
    {
        "linear": lambda stripes: stripes,
        "striped": lambda stripes: stripes,
        "cache": lambda stripes: stripes,
        "mirror": lambda _stripes: 1,
        "raid0": lambda stripes: stripes,
        "raid1": lambda _stripes: 1,
        "raid4": lambda stripes: stripes - 1,
        "raid5": lambda stripes: stripes - 1,
        "raid6": lambda stripes: stripes - 2,
        "raid10": lambda stripes: stripes // 2,
    }
)

_THIN: Final = "thin"

_DM_PREFIX: Final = "LVM-"
_UUID_LENGTH: Final = 32
_GROUP_NAME: Final = re.compile(r"[A-Za-z0-9+_.][A-Za-z0-9+_.-]{0,126}")


class LogicalVolume(Struct, frozen=True):
    """What LVM reports of a logical volume.

    Attributes:
        name: the argument by which LVM knows it.
        vg_name: its volume group.
        vg_uuid, lv_uuid: without their dashes.
        size: of the volume.
        extent_size: of the volume group; sizes are multiples of it.
        vg_free: unallocated space of the volume group.
        segment_type: of its last segment, which lvextend continues: ``linear``, ``thin``, ...
        stripes: of the last segment, those with copies and parity included.
        pool: the name of the thin pool that its space comes from; empty if it is not a thin one.
    """

    name: str
    vg_name: str
    vg_uuid: str
    lv_uuid: str
    size: int
    extent_size: int
    vg_free: int
    segment_type: str
    stripes: int
    pool: str = ""

    @property
    def growth_unit(self) -> int:
        """What it grows by: an extent on every stripe that holds data of its own."""
        data_of = _DATA_STRIPES.get(self._kind)
        data_stripes = self.stripes if data_of is None else data_of(self.stripes)
        return self.extent_size * max(data_stripes, 1)

    @property
    def is_extensible(self) -> bool:
        """Whether lvextend makes such a volume larger, as far as that is known beforehand."""
        return self._kind in _DATA_STRIPES or self.segment_type == _THIN

    @property
    def largest_size(self) -> int:
        """What it can be extended to as long as nobody else takes space from the volume group.

        How the free extents lie on the physical volumes can make it less for one on several
        stripes.
        """
        if self._kind not in _DATA_STRIPES:
            return self.size
        return self.size + self.vg_free // (self.extent_size * self.stripes) * self.growth_unit

    @property
    def _kind(self) -> str:
        """Its type, whatever the layout of its parity (``raid5_ls``, ``raid6_zr``, ...)."""
        return self.segment_type.partition("_")[0]

    def size_after_growth(self, required: int) -> int:
        """The size that lvextend makes it when *required* is asked for; never less than now."""
        units = max(divide_up(required - self.size, self.growth_unit), 0)
        return self.size + units * self.growth_unit

    def size_after_shrinking(self, wanted: int) -> int:
        """The smallest size that holds *wanted*; never more than now."""
        return min(round_up(wanted, self.extent_size), self.size)


class VolumeSharing(Struct, frozen=True):
    """What LVM reports of the hosts that may use a logical volume.

    Attributes:
        name: the argument by which LVM knows it.
        vg_name: its volume group.
        owner: the system ID of the one host that may use the group; empty if it has none.
        locking: what keeps its hosts apart, ``sanlock`` or ``dlm`` of lvmlockd, or ``clvm``;
            empty if LVM does not know of several.
        is_told: whether this lvm knows who holds a volume of a shared group.
        exclusive: whether this host holds it, and no other one can.
    """

    name: str
    vg_name: str
    owner: str
    locking: str
    is_told: bool
    exclusive: bool


class GroupSharing(Struct, frozen=True):
    """A volume group: its UUID without dashes, its free bytes, and what keeps hosts apart.

    ``locking`` is that of :class:`VolumeSharing`.
    """

    uuid: str
    free: int
    locking: str


class VolumeUuids(Struct, frozen=True):
    """What no two logical volumes have in common: their UUIDs, without dashes."""

    group: str
    volume: str


class DeviceMapperName(Struct, frozen=True):
    """What sysfs tells of a logical volume's device."""

    name: str
    vg_uuid: str
    lv_uuid: str

    @property
    def uuids(self) -> VolumeUuids:
        """Those of the group and of the volume."""
        return VolumeUuids(self.vg_uuid, self.lv_uuid)


def device_mapper_name(device: int, sysfs: Path = Path("/sys")) -> DeviceMapperName | None:
    """The logical volume behind a device number (``st_rdev``); None if it is none."""
    directory = sysfs / "dev" / "block" / f"{os.major(device)}:{os.minor(device)}" / "dm"
    try:
        uuid = (directory / "uuid").read_text(encoding="ascii").strip()
        name = (directory / "name").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    uuids = uuids_in(uuid)
    return None if uuids is None else DeviceMapperName(name, uuids.group, uuids.volume)


def group_as_pool(vg_uuid: str) -> str:
    """What a volume group is called where volumes take their space from it."""
    return f"volume group {vg_uuid}"


def uuids_in(dm_uuid: str) -> VolumeUuids | None:
    """The UUIDs of a logical volume in what the device mapper has as its UUID; None if it is none.

    That is "LVM-", the two UUIDs without dashes, and a suffix on the hidden parts of a volume.
    """
    uuids = dm_uuid.removeprefix(_DM_PREFIX)
    if uuids == dm_uuid or len(uuids) != 2 * _UUID_LENGTH:
        return None
    return VolumeUuids(uuids[:_UUID_LENGTH], uuids[_UUID_LENGTH:])


def find_by_device(image: str, device: DeviceMapperName) -> LogicalVolume:
    """What LVM reports of the volume behind a device; *image* is what messages call it.

    Raises:
        NotALogicalVolume: LVM does not know it, or knows another one under its name.
        LvmMissing, LvmFailed: there is no report.
    """
    volume = find_by_path(image, f"/dev/mapper/{device.name}")
    if (volume.vg_uuid, volume.lv_uuid) != (device.vg_uuid, device.lv_uuid):
        raise NotALogicalVolume(image, f"lvm has another volume as /dev/mapper/{device.name}")
    return volume


def find_by_path(image: str, path: str) -> LogicalVolume:
    """What LVM reports of the volume with a path; *image* is what messages call it.

    Raises:
        NotALogicalVolume: LVM does not know it, or there is no report.
        LvmMissing
    """
    try:
        rows = rows_told(image, "lvs", *OF_ANY_HOST, "-o", ",".join(_FIELDS), "--", path)
    except LvmFailed as error:
        raise NotALogicalVolume(image, error.reason) from error
    if not rows:
        raise NotALogicalVolume(image, "it is not in the report of 'lvm lvs'")
    try:
        last = max(rows, key=lambda row: int(row["seg_start"]))
        volume = LogicalVolume(
            name=f"{last['vg_name']}/{last['lv_name']}",
            vg_name=last["vg_name"],
            vg_uuid=last["vg_uuid"].replace("-", ""),
            lv_uuid=last["lv_uuid"].replace("-", ""),
            size=int(last["lv_size"]),
            extent_size=int(last["vg_extent_size"]),
            vg_free=int(last["vg_free"]),
            segment_type=last["segtype"],
            stripes=max(int(last["stripes"]), 1),
            pool=last.get("pool_lv", "") if last["segtype"] == _THIN else "",
        )
    except (KeyError, ValueError) as error:
        reason = f"the report of 'lvm lvs' cannot be read: {error!r}"
        raise NotALogicalVolume(image, reason) from error
    if len({(row["vg_name"], row["lv_name"]) for row in rows}) != 1:
        raise NotALogicalVolume(image, "lvm has several volumes under that name")
    return volume


def sharing_of(image: str, device: DeviceMapperName) -> VolumeSharing:
    """Who else may use the volume behind a device; *image* is what messages call it.

    The fields and values are those of lvmreport(7) and lvmlockd(8).

    Raises:
        NotALogicalVolume: LVM does not know it, or there is no report.
        LvmMissing
    """
    path = f"/dev/mapper/{device.name}"
    try:
        rows = rows_told(image, "lvs", *OF_ANY_HOST, "-o", _SHARING_FIELDS, "--", path)
        found = next((row for row in rows if _lv_uuid_in(row) == device.lv_uuid), None)
        if found is None:
            raise NotALogicalVolume(image, f"{path} is not in the report of 'lvm lvs'")
        locking = _locking_in(found)
        # A group that is not shared is what nearly all are: nothing more is asked of it.
        is_told = bool(locking) and _asks_holder(locking, _version(image))
    except LvmFailed as error:
        raise NotALogicalVolume(image, error.reason) from error
    return VolumeSharing(
        name=f"{found.get('vg_name')}/{found.get('lv_name')}",
        vg_name=found.get("vg_name", ""),
        owner=found.get("vg_systemid", ""),
        locking=locking,
        is_told=is_told,
        exclusive=is_told and found.get("lv_active_exclusively") in ("active exclusively", "1"),
    )


def group_sharing(group: str) -> GroupSharing | None:
    """What LVM reports of a volume group; None if there is none of this name with a volume.

    Raises:
        LvmMissing, LvmFailed: there is no report.
    """
    for row in rows_told(group, "lvs", *OF_ANY_HOST, "-o", "lv_name,vg_all"):
        if row.get("vg_name") == group:
            try:
                uuid, free = row["vg_uuid"].replace("-", ""), int(row["vg_free"])
            except (KeyError, ValueError) as error:
                reason = f"its report cannot be read: {error!r}"
                raise LvmFailed(group, "lvm lvs", 0, reason) from error
            return GroupSharing(uuid, free, _locking_in(row))
    return None


def _lv_uuid_in(row: dict[str, str]) -> str:
    return row.get("lv_uuid", "").replace("-", "")


def _locking_in(row: dict[str, str]) -> str:
    lock_type = row.get("vg_lock_type", "")
    if lock_type not in ("", "none"):
        return lock_type
    if _says_yes(row.get("vg_clustered", "")):
        return _CLVM
    return "lvmlockd" if _says_yes(row.get("vg_shared", "")) else ""


def _asks_holder(locking: str, version: tuple[int, ...]) -> bool:
    """Whether this lvm asks who holds a volume exclusively.

    One that does not says that of every volume which is active here, shared or not
    (``_lvactiveexclusively_disp()`` in LVM's lib/report/report.c).
    """
    if locking == _CLVM:
        return (0,) < version < _WITHOUT_CLVMD
    return version >= _ASKS_LVMLOCKD


def _version(image: str) -> tuple[int, ...]:
    """The version of lvm, such as (2, 3, 16); empty if it is not understood.

    Raises:
        LvmMissing, LvmFailed
    """
    try:
        found = re.search(r"LVM version:\s*(\d+)\.(\d+)\.(\d+)", run_command(image, "version"))
    except LvmUnfinished as error:
        raise LvmFailed(image, error.command, -signal.SIGTERM, error.sentence) from error
    return () if found is None else tuple(map(int, found.groups()))


def _says_yes(value: str) -> bool:
    """Whether a binary field is set, in words or as a number; one that lvm is unsure of may be."""
    return value not in ("", "0")


def system_id(image: str) -> str:
    """The system ID of this host; empty if it has none.

    Raises:
        NotALogicalVolume: lvm does not say.
        LvmMissing
    """
    try:
        output = run_command(image, "systemid")
    except (LvmFailed, LvmUnfinished) as error:
        raise NotALogicalVolume(image, error.sentence) from error
    _, _, name = output.partition(_SYSTEM_ID_LABEL)
    return name.strip()


def is_active(image: str, path: str) -> bool:
    """Whether the kernel has the volume with a path; *image* is what messages call it.

    Raises:
        NotALogicalVolume: LVM does not know it.
        LvmMissing, LvmFailed: there is no report.
    """
    try:
        rows = rows_told(image, "lvs", "-o", "lv_active", "--", path)
    except LvmFailed as error:
        raise NotALogicalVolume(image, error.reason) from error
    return any(row.get("lv_active") for row in rows)


def activate(image: str, path: str) -> None:
    """Activate a volume for this host alone; its names exist when this returns.

    Raises:
        LvmMissing, LvmFailed, LvmUnfinished: it is not up.
    """
    # -K also brings up thin snapshots, which else are left out; -aey keeps other hosts out where a
    # group is shared, and is no other than -ay where it is not.
    run_command(image, "lvchange", "-aey", "-K", "--", path)


def deactivate(image: str, path: str) -> None:
    """Deactivate a volume that nobody has open.

    Raises:
        LvmMissing, LvmFailed, LvmUnfinished: it is not down.
    """
    run_command(image, "lvchange", "-an", "--", path)


def inactive_volumes(image: str, vg_uuids: frozenset[str]) -> list[str]:
    """The paths that inactive volumes of these volume groups have when they are active.

    Raises:
        LvmMissing, LvmFailed: there is no report.
    """
    rows = rows_told(image, "lvs", "-o", "vg_uuid,lv_path,lv_active,lv_layout")
    return [
        row["lv_path"]
        for row in rows
        if row.get("vg_uuid", "").replace("-", "") in vg_uuids
        and _can_hold_an_image(row)
        and not row.get("lv_active")
    ]


def _can_hold_an_image(row: Mapping[str, str]) -> bool:
    """Whether a volume has a name in the file system when it is active.

    Of a pool that caches nothing yet, LVM tells such a name, and cannot activate it (2.03).
    """
    return bool(row.get("lv_path")) and "pool" not in row.get("lv_layout", "").split(",")


class ListedVolume(Struct, frozen=True):
    """A volume of a group: the path that it has when it is active, and whether it is."""

    path: str
    active: bool


def is_group_name(name: str) -> bool:
    """Whether a volume group could have the name (lvm(8), "Valid names")."""
    return _GROUP_NAME.fullmatch(name) is not None and name not in {".", ".."}


def volumes_in(group: str) -> list[ListedVolume]:
    """The volumes of a group that have a name in the file system; none if there is no such group.

    Raises:
        LvmMissing, LvmFailed: there is no report.
    """
    return [
        ListedVolume(row["lv_path"], bool(row.get("lv_active")))
        for row in _named_volumes(group)
        if row.get("vg_name") == group
    ]


def groups_with_volumes() -> list[str]:
    """The names of the groups that have volumes with a name in the file system.

    Raises:
        LvmMissing, LvmFailed: there is no report.
    """
    return sorted({row["vg_name"] for row in _named_volumes("volume groups") if "vg_name" in row})


def _named_volumes(about: str) -> list[dict[str, str]]:
    fields = "vg_name,lv_path,lv_active,lv_layout"
    rows = rows_told(about, "lvs", *OF_ANY_HOST, "-o", fields)
    return [row for row in rows if _can_hold_an_image(row)]


def extend(image: str, volume: LogicalVolume, size: int) -> None:
    """Make a volume larger; *size* is one that :meth:`LogicalVolume.size_after_growth` gave.

    Not durable before :func:`make_metadata_durable`.

    Raises:
        LvmMissing, LvmFailed: it has its old size.
        LvmUnfinished: it has its old or its new size.
    """
    run_command(image, "lvextend", "-L", f"{size}b", "--", volume.name)


def reduce(image: str, volume: LogicalVolume, size: int) -> None:
    """Make a volume smaller; *size* is one that :meth:`LogicalVolume.size_after_shrinking` gave.

    What lay behind *size* is lost.

    Raises:
        LvmMissing, LvmFailed: it has its old size.
        LvmUnfinished: it has its old or its new size.
    """
    # -f answers the question whether the data behind the new end may be destroyed.
    run_command(image, "lvreduce", "-f", "-L", f"{size}b", "--", volume.name)


def make_metadata_durable(image: str, group: str) -> None:
    """Return when what the metadata of a volume group says will survive a power cut.

    lvm returns before that: it writes the metadata, but does not make the physical volumes empty
    their caches.

    Raises:
        LvmMissing, LvmFailed: the physical volumes are not known.
        CannotOpen, FlushFailed: one of them could not be made to.
    """
    rows = rows_told(image, "pvs", "-o", "pv_name,vg_name")
    devices = sorted({row["pv_name"] for row in rows if row.get("vg_name") == group})
    if not devices:
        raise LvmFailed(image, "lvm pvs", 0, f"no physical volume of {group} in it")
    for device in devices:
        _flush_device(device)


def _flush_device(path: str) -> None:
    # LVM reports a lost device as "[unknown]".
    if not path.startswith("/"):
        raise CannotOpen(path, "flushing", "the physical volume is missing")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CannotOpen(path, "flushing", reason_of(error)) from error
    try:
        os.fsync(fd)
    except OSError as error:
        raise FlushFailed(path, reason_of(error)) from error
    finally:
        os.close(fd)


def rows_told(image: str, command: str, *arguments: str) -> list[dict[str, str]]:
    """The rows of a report, values as strings.

    Raises:
        LvmMissing, LvmFailed: there is no report.
    """
    try:
        output = run_command(image, command, *_REPORT, *arguments)
    except LvmUnfinished as error:
        # A report changes nothing, so there is no outcome to be unsure of.
        reason = f"it had not ended after {error.seconds} seconds"
        raise LvmFailed(image, error.command, -signal.SIGTERM, reason) from error
    try:
        tables = [table for report in json.loads(output)["report"] for table in report.values()]
        return [_as_strings(row) for table in tables for row in table]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"its report cannot be read: {error!r}"
        raise LvmFailed(image, f"lvm {command}", 0, reason) from error


def _as_strings(row: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in row.items()}


def run_command(image: str, command: str, *arguments: str) -> str:
    """As :func:`chainmerge.storage.lvm_process.run_lvm`."""
    # Imported where it is used: most images lie in files.
    from chainmerge.storage.lvm_process import run_lvm  # noqa: PLC0415

    return run_lvm(image, command, *arguments)
