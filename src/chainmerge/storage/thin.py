# SPDX-License-Identifier: Apache-2.0
"""What the pool of a thin volume has left, and what writing to the volume may take of it.

A pool gives its space in chunks, at the first write to each, and once more at the first write to
one that an LVM snapshot shares. Which chunks a volume has, and which are shared, LVM does not say:
so what is going to be written counts in whole, which is an upper bound. All sizes are in bytes.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from chainmerge.arithmetic.rounding import divide_up, round_up
from chainmerge.storage import lvm
from chainmerge.storage.volume_errors import ExtensionRefused, LvmFailed, NotALogicalVolume

_FIELDS: Final = (
    "lv_uuid,lv_size,lv_metadata_size,chunk_size,data_percent,metadata_percent,vg_free,"
    "vg_extent_size"
)
# LVM gives two decimals.
_PERCENT_STEP: Final = 0.01
# A mapping takes 16 bytes in a B-tree whose nodes may be half empty, and tables above them; LVM's
# own estimate of what a pool needs (lvmthin(7)) is 64. Nodes are copied before they are changed.
_BYTES_PER_CHUNK: Final = 64
_COPIED_NODES: Final = 256 << 10


class ThinPool(Struct, frozen=True):
    """What LVM reports of a pool.

    Attributes:
        name: the argument by which LVM knows it.
        uuid: what tells it from others.
        chunk: what it gives at once.
        size, free: of its data, not less than what there is.
        metadata_size, metadata_free: the same of what notes where it is.
        vg_free: unallocated space of the volume group.
        extent_size: of the volume group.
    """

    name: str
    uuid: str
    chunk: int
    size: int
    free: int
    metadata_size: int
    metadata_free: int
    vg_free: int
    extent_size: int

    def beside(self, taken: int) -> ThinPool:
        """The same, once others have taken so many bytes of data."""
        metadata = self._metadata_of(taken)
        of_group = self.lacks(taken).of_group
        return ThinPool(
            self.name,
            self.uuid,
            self.chunk,
            self.size,
            max(0, self.free - taken),
            self.metadata_size,
            max(0, self.metadata_free - metadata),
            max(0, self.vg_free - of_group),
            self.extent_size,
        )

    def _metadata_of(self, allocates: int) -> int:
        if not allocates:
            return 0
        return divide_up(allocates, self.chunk) * _BYTES_PER_CHUNK + _COPIED_NODES

    def lacks(self, allocates: int) -> PoolShortage:
        """What is not there of what *allocates* bytes of chunks take."""
        return PoolShortage(
            max(0, round_up(allocates, self.chunk) - self.free),
            max(0, self._metadata_of(allocates) - self.metadata_free),
        )

    def remedy(self, allocates: int) -> str:
        """What to do where it does not have what *allocates* bytes take."""
        by = self.extension(allocates).of_group
        extend = "extend the pool (a merge does it with --extend-pool; or 'lvextend')"
        if by <= self.vg_free:
            return f"{extend}, which takes {by} bytes of the volume group's free space"
        return (
            f"add a physical volume to the volume group ('vgextend'), of which the pool needs {by} "
            f"bytes and {self.vg_free} are free; then {extend}"
        )

    def extension(self, allocates: int) -> PoolShortage:
        """By how much it has to be extended so that it has what *allocates* bytes take."""
        lacks = self.lacks(allocates)
        unit = self.extent_size
        return PoolShortage(round_up(lacks.data, unit), round_up(lacks.metadata, unit))


class PoolShortage(Struct, frozen=True):
    """Bytes of data and of metadata."""

    data: int
    metadata: int

    @property
    def total(self) -> int:
        """Of both."""
        return self.data + self.metadata

    @property
    def of_group(self) -> int:
        """What the volume group gives for it: LVM keeps a spare as large as the metadata."""
        return self.data + 2 * self.metadata


NOTHING_LACKS: Final = PoolShortage(0, 0)


def pool_of(image: str, volume: lvm.LogicalVolume) -> ThinPool | None:
    """The pool of a volume; None if it is not a thin one. *image* is what messages call it.

    Raises:
        NotALogicalVolume: LVM does not say.
        LvmMissing, LvmFailed: there is no report.
    """
    if not volume.pool:
        return None
    name = f"{volume.vg_name}/{volume.pool}"
    rows = lvm.rows_told(image, "lvs", *lvm.OF_ANY_HOST, "-o", _FIELDS, "--", name)
    try:
        (row,) = rows
        size, metadata_size = int(row["lv_size"]), int(row["lv_metadata_size"])
        return ThinPool(
            name=name,
            uuid=row["lv_uuid"],
            chunk=int(row["chunk_size"]),
            size=size,
            free=_unused(size, row["data_percent"]),
            metadata_size=metadata_size,
            metadata_free=_unused(metadata_size, row["metadata_percent"]),
            vg_free=int(row["vg_free"]),
            extent_size=int(row["vg_extent_size"]),
        )
    except (KeyError, ValueError) as error:
        reason = f"the report of its thin pool {name} cannot be read: {error!r}"
        raise NotALogicalVolume(image, reason) from error


def _unused(size: int, percent: str) -> int:
    used = float(percent) + _PERCENT_STEP
    return max(0, int(size * (100.0 - used) / 100.0))


def extend_pool(image: str, volume: lvm.LogicalVolume, allocates: int) -> None:
    """Extend the pool of a thin volume so that it can give *allocates* bytes.

    Not durable before :func:`chainmerge.storage.lvm.make_metadata_durable`.

    Raises:
        ExtensionRefused: LVM did not extend it.
        NotALogicalVolume, LvmMissing, LvmFailed: there is no report.
        LvmUnfinished: it is extended or not.
    """
    pool = pool_of(image, volume)
    if pool is None:
        return
    # First what notes where data is: without it more data is of no use.
    by = pool.extension(allocates).metadata
    if by:
        _extend(image, pool, "--poolmetadatasize", pool.metadata_size + by)
    # lvm may have extended the one with the other.
    pool = pool_of(image, volume)
    by = 0 if pool is None else pool.extension(allocates).data
    if pool is not None and by:
        _extend(image, pool, "-L", pool.size + by)


def _extend(image: str, pool: ThinPool, option: str, size: int) -> None:
    try:
        lvm.run_command(image, "lvextend", option, f"{size}b", "--", pool.name)
    except LvmFailed as error:
        raise ExtensionRefused(image, size, error.status, error.reason) from error
