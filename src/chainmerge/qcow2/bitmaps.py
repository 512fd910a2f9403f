# SPDX-License-Identifier: Apache-2.0
"""The persistent dirty bitmaps of an image: directory, tables and bits.

Rules are those of the qcow2 specification ("Bitmaps") and of what QEMU 7.2 accepts
(``bitmap_list_load``, ``check_dir_entry``, ``load_bitmap_data`` in block/qcow2-bitmap.c):
an image in which one bitmap breaks them is one that QEMU does not open at all. A bitmap
that only asks for something unknown is listed, but has no content for us.
"""

from __future__ import annotations

import struct
from enum import IntFlag
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.counting import counted
from chainmerge.arithmetic.rounding import divide_up, round_up
from chainmerge.qcow2.bits import MAX_PACKED_SIZE, BitSet, is_storable, packed_size
from chainmerge.qcow2.table_errors import BadBitmapDirectory, BadBitmapTable, UnreadableBitmap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.arithmetic.arrays import BoolArray, U8Array, U64Array
    from chainmerge.qcow2.features import BitmapsExtension
    from chainmerge.qcow2.header import Header
    from chainmerge.qcow2.image import Qcow2Image

DIRTY_TRACKING = 1
"""The only type of bitmap that the specification defines."""

# QEMU's limits (block/qcow2.h and block/qcow2-bitmap.c): QCOW2_MAX_BITMAPS,
# QCOW2_MAX_BITMAP_DIRECTORY_SIZE, BME_MAX_TABLE_SIZE, BME_{MIN,MAX}_GRANULARITY_BITS,
# BME_MAX_NAME_SIZE.
MAX_BITMAPS = 65535
MAX_DIRECTORY_SIZE = 1024 * MAX_BITMAPS
MAX_TABLE_ENTRIES = 0x800_0000
MIN_GRANULARITY_BITS = 9
MAX_GRANULARITY_BITS = 31
MAX_BITMAP_NAME_BYTES = 1023

#: The specification allows granularities up to here, though QEMU does not.
MAX_SPECIFIED_GRANULARITY_BITS = 63
TABLE_ENTRY_SIZE = 8
TABLE_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
TABLE_RESERVED = 0xFF00_0000_0000_01FE
TABLE_ALL_ONES = 1
_DIRECTORY_ENTRY = struct.Struct(">QIIBBHI")

# Bits are read in pieces of this size at most.
_READ_BYTES = 4 << 20


class BitmapFlag(IntFlag):
    """Flags of a directory entry; unknown ones are kept."""

    IN_USE = 1
    """Not stored properly: the content is worthless."""
    AUTO = 2
    """Enabled: every write to the disk must be recorded."""
    EXTRA_DATA_COMPATIBLE = 4
    """The bitmap may be used by programs that do not know its extra data."""


_QEMU_FLAGS = int(BitmapFlag.IN_USE | BitmapFlag.AUTO)


class BitmapEntry(Struct, frozen=True):
    """One entry of the bitmap directory."""

    name: str
    """UTF-8 with surrogate escapes; unique in its image."""
    granularity: int
    """Bytes of the guest's disk that one bit stands for."""
    flags: BitmapFlag
    table_offset: int
    """File offset."""
    table_size: int
    """Entries."""
    extra_data: bytes
    type: int

    @property
    def in_use(self) -> bool:
        """Whether the bitmap was not stored properly, so that its bits mean nothing."""
        return bool(self.flags & BitmapFlag.IN_USE)

    @property
    def auto(self) -> bool:
        """Whether the bitmap is enabled; a disabled one lacks what was written since."""
        return bool(self.flags & BitmapFlag.AUTO)

    @property
    def readable(self) -> bool:
        """Whether nothing about the bitmap is unknown to QEMU 7.2 or to us."""
        return not self.unknown and not self.has_odd_name

    @property
    def has_odd_name(self) -> bool:
        """Whether the name is empty or has a NUL byte: QEMU knows the bitmap by another one."""
        return not self.name or "\0" in self.name

    @property
    def unknown(self) -> str:
        """What QEMU does not know about the bitmap, in words; otherwise empty.

        QEMU does not open an image that has such a bitmap.
        """
        if self.type != DIRTY_TRACKING:
            return f"its type is {self.type}"
        if self.extra_data:
            return f"it has {counted(len(self.extra_data), 'byte')} of extra data"
        # As numbers: the complement of an IntFlag has no unknown bits.
        if int(self.flags) & ~_QEMU_FLAGS:
            return f"its flags are {int(self.flags):#x}"
        if not 1 << MIN_GRANULARITY_BITS <= self.granularity <= 1 << MAX_GRANULARITY_BITS:
            return f"its granularity is {self.granularity} bytes"
        return ""


def read_directory(image: Qcow2Image) -> tuple[BitmapEntry, ...]:
    """The image's bitmaps in the order of the directory; none if it has no bitmaps extension.

    Whether the extension can be trusted (``header.bitmaps_trusted``) is for the caller to judge;
    QEMU ignores it if it cannot.

    Raises:
        BadBitmapDirectory: the directory is one with which QEMU would not open the image.
    """
    entries = []
    for entry in _listed_entries(image):
        problem = _misplaced(image, entry)
        if problem is not None:
            _refuse(image, problem)
        entries.append(entry)
    return tuple(entries)


class SalvagedDirectory(Struct, frozen=True):
    """What a directory lists, as far as it can be told.

    Attributes:
        entries: The bitmaps whose tables are where a table can be.
        lost: What is wrong with each of the others, by name.
    """

    entries: tuple[BitmapEntry, ...]
    lost: dict[str, str]


def salvage_directory(image: Qcow2Image) -> SalvagedDirectory:
    """As :func:`read_directory`, for an image that QEMU need not open.

    Raises:
        BadBitmapDirectory: nobody can tell which bitmaps the directory lists.
    """
    entries = []
    lost = {}
    for entry in _listed_entries(image):
        problem = _misplaced(image, entry)
        if problem is None:
            entries.append(entry)
        else:
            lost[entry.name] = problem
    return SalvagedDirectory(tuple(entries), lost)


def _listed_entries(image: Qcow2Image) -> Iterator[BitmapEntry]:
    """What the directory lists, wherever the tables are. Raises BadBitmapDirectory."""
    extension = image.header.bitmaps
    if extension is None:
        return
    _check_extension(image, extension)
    directory = image.readable.read(extension.directory_offset, extension.directory_size)
    names: set[str] = set()
    position = 0
    while position < len(directory):
        if len(names) == extension.count:
            promised = counted(extension.count, "bitmap")
            _refuse(image, f"it holds more than the {promised} that it should hold")
        entry, length = _parse_entry(image, directory, position)
        # QEMU cuts names at a NUL byte.
        name = entry.name.partition("\0")[0]
        if name in names:
            _refuse(image, f"two bitmaps have the name {name!r}")
        names.add(name)
        yield entry
        position += length
    if len(names) != extension.count:
        held = counted(len(names), "bitmap")
        _refuse(image, f"it holds {held}, but should hold {extension.count}")


def read_table(image: Qcow2Image, entry: BitmapEntry) -> U64Array:
    """A bitmap's table as it is stored: uint64[table_size], at most 8 MiB.

    Each entry stands for a cluster of the serialised bits: 0 for zeros, 1 for ones, else
    the file offset of the cluster.

    Raises:
        BadBitmapTable: an entry is not one of these, or not the offset of a cluster in the file.
    """
    size = image.readable.size
    if entry.table_offset + entry.table_size * TABLE_ENTRY_SIZE > size:
        raise BadBitmapTable(image.name, entry.name, "its table reaches past the end of the file")
    table = load_table(image, entry)
    _refuse_entries(image, entry, table, table >= np.uint64(size), "is not within the file")
    return table


def load_table(image: Qcow2Image, entry: BitmapEntry) -> U64Array:
    """Like :func:`read_table`, but the caller checks whether the clusters are in the file.

    Raises:
        BadBitmapTable: the table is behind the end of the file, or an entry is not 0, 1, or a
            multiple of the cluster size.
    """
    if entry.table_offset >= image.readable.size:
        raise BadBitmapTable(image.name, entry.name, "its table is behind the end of the file")
    data = image.readable.read(entry.table_offset, entry.table_size * TABLE_ENTRY_SIZE)
    table = np.frombuffer(data, dtype=">u8").astype(np.uint64)
    offset = table & np.uint64(TABLE_OFFSET_MASK)
    reserved = table & np.uint64(TABLE_RESERVED) != 0
    _refuse_entries(image, entry, table, reserved, "has reserved bits set")
    contradicts = (offset != 0) & (table != offset)
    _refuse_entries(image, entry, table, contradicts, "is an offset and says 'all bits set'")
    unaligned = offset % np.uint64(image.header.cluster_size) != 0
    _refuse_entries(image, entry, table, unaligned, "is not where a cluster starts")
    return table


def read_bits(image: Qcow2Image, entry: BitmapEntry) -> BitSet:
    """The bits of a bitmap, for the image's present disk size.

    Clusters that the table has as all zeros or all ones are not read and take no memory, nor
    do stored ones that turn out to be so. Tail bits are ignored.

    Raises:
        UnreadableBitmap: the bitmap is in use, or something about it is unknown.
        BadBitmapTable: its table is damaged, or uses a cluster twice.
    """
    if entry.in_use:
        raise UnreadableBitmap(image.name, entry.name, "it was not stored properly ('in use')")
    if not entry.readable:
        reason = entry.unknown or "its name is empty or has a NUL byte"
        raise UnreadableBitmap(image.name, entry.name, reason)
    table = read_table(image, entry)
    offsets = np.sort(table[table > TABLE_ALL_ONES])
    # Without this, a small file could claim 512 MiB of bits for each of 65535 bitmaps.
    if (offsets[1:] == offsets[:-1]).any():
        raise BadBitmapTable(image.name, entry.name, "its table uses a cluster twice")
    size = image.header.virtual_size
    return BitSet.from_segments(_segments(image, table), size, entry.granularity)


def bitmap_table_entries(header: Header, granularity: int) -> int:
    """How many entries the table of a valid bitmap has: one a cluster of serialised bits."""
    return divide_up(packed_size(header.virtual_size, granularity), header.cluster_size)


def directory_entry_size(name_bytes: int, extra_bytes: int) -> int:
    """How many bytes a directory entry takes, padding included."""
    return round_up(_DIRECTORY_ENTRY.size + name_bytes + extra_bytes, 8)


def _refuse(image: Qcow2Image, problem: str) -> NoReturn:
    raise BadBitmapDirectory(image.name, problem)


def _check_extension(image: Qcow2Image, extension: BitmapsExtension) -> None:
    offset, size = extension.directory_offset, extension.directory_size
    cluster_size = image.header.cluster_size
    if not 1 <= extension.count <= MAX_BITMAPS:
        promised = counted(extension.count, "bitmap")
        _refuse(image, f"it should hold {promised}, but can hold 1 to {MAX_BITMAPS}")
    if not 1 <= size <= MAX_DIRECTORY_SIZE:
        _refuse(image, f"its size is {size} bytes, but must be 1 to {MAX_DIRECTORY_SIZE}")
    if offset == 0 or offset % cluster_size:
        _refuse(image, f"it is at offset {offset:#x}, which is not where a cluster starts")
    if offset + size > image.readable.size:
        _refuse(image, f"its {size} bytes at offset {offset:#x} reach past the end of the file")


def _parse_entry(image: Qcow2Image, directory: bytes, position: int) -> tuple[BitmapEntry, int]:
    """The entry at *position* of the directory, and its length with padding."""
    if position + _DIRECTORY_ENTRY.size > len(directory):
        _refuse(image, f"it ends within the entry at byte {position}")
    table_offset, table_size, flags, kind, granularity_bits, name_size, extra_size = (
        _DIRECTORY_ENTRY.unpack_from(directory, position)
    )
    length = directory_entry_size(name_size, extra_size)
    if position + length > len(directory):
        _refuse(image, f"it ends within the entry at byte {position}")
    extra_start = position + _DIRECTORY_ENTRY.size
    extra = directory[extra_start : extra_start + extra_size]
    raw_name = directory[extra_start + extra_size : extra_start + extra_size + name_size]
    if name_size > MAX_BITMAP_NAME_BYTES:
        _refuse(image, f"the entry at byte {position} has a name of {name_size} bytes")
    name = raw_name.decode("utf-8", "surrogateescape")
    if granularity_bits > MAX_SPECIFIED_GRANULARITY_BITS:
        _refuse(image, f"bitmap {name!r} has a granularity of 2^{granularity_bits} bytes")
    entry = BitmapEntry(
        name=name,
        granularity=1 << granularity_bits,
        flags=BitmapFlag(flags),
        table_offset=table_offset,
        table_size=table_size,
        extra_data=extra,
        type=kind,
    )
    return entry, length


def _misplaced(image: Qcow2Image, entry: BitmapEntry) -> str | None:
    """Why the bitmap's table cannot be what the entry says, None if it can."""
    header = image.header
    most = min(MAX_TABLE_ENTRIES, MAX_PACKED_SIZE // header.cluster_size)
    if not 1 <= entry.table_size <= most:
        return (
            f"the table of bitmap {entry.name!r} has {counted(entry.table_size, 'entry')}, but can "
            f"have 1 to {most}"
        )
    if entry.table_offset == 0 or entry.table_offset % header.cluster_size:
        return (
            f"the table of bitmap {entry.name!r} is at offset {entry.table_offset:#x}, "
            "which is not where a cluster starts"
        )
    if entry.in_use or not entry.readable:
        # QEMU marks bitmaps in use at once, and resizes them when it closes the image.
        return None
    needed = bitmap_table_entries(header, entry.granularity)
    if entry.table_size != needed:
        return (
            f"the table of bitmap {entry.name!r} has {counted(entry.table_size, 'entry')}, but a "
            f"disk of {header.virtual_size} bytes needs {needed}"
        )
    return None


def _refuse_entries(
    image: Qcow2Image,
    entry: BitmapEntry,
    table: U64Array,
    bad: BoolArray,
    problem: str,
) -> None:
    if bad.any():
        index = int(np.argmax(bad))
        value = int(table[index])
        problem = f"entry {index} of its table, {value:#018x}, {problem}"
        raise BadBitmapTable(image.name, entry.name, problem)


def _segments(image: Qcow2Image, table: U64Array) -> Iterator[tuple[int, U8Array]]:
    """The parts of the serialised bits that are not zeros, ascending."""
    cluster_size = image.header.cluster_size
    most = max(1, _READ_BYTES // cluster_size)
    for first, count, value in _runs(table, cluster_size):
        for start in range(0, count, most):
            length = min(most, count - start) * cluster_size
            index = first + start
            if value == TABLE_ALL_ONES:
                yield index * cluster_size, np.full(length, 0xFF, dtype=np.uint8)
            else:
                data = image.readable.read(value + start * cluster_size, length)
                yield index * cluster_size, np.frombuffer(data, dtype=np.uint8)


def _runs(table: U64Array, cluster_size: int) -> Iterator[tuple[int, int, int]]:
    """Runs of table entries that can be read together, as (index, entries, first entry)."""
    stored = np.flatnonzero(table)
    if not len(stored):
        return
    values = table[stored]
    ones = values == TABLE_ALL_ONES
    follows = np.where(ones[:-1], ones[1:], values[1:] == values[:-1] + np.uint64(cluster_size)) & (
        np.diff(stored) == 1
    )
    heads = np.concatenate(([0], np.flatnonzero(~follows) + 1))
    lengths = np.diff(np.concatenate((heads, [len(stored)])))
    yield from zip(stored[heads].tolist(), lengths.tolist(), values[heads].tolist(), strict=True)


MIN_GRANULARITY = 1 << MIN_GRANULARITY_BITS
MAX_GRANULARITY = 1 << MAX_GRANULARITY_BITS


def storable_granularity(disk_size: int, wanted: int) -> int:
    """*wanted*, or the next coarser granularity (bytes) at which QEMU stores such a bitmap.

    A larger disk can make a bitmap too large to be stored as finely as before. A coarser
    one covers the same writes.
    """
    granularity = min(max(wanted, MIN_GRANULARITY), MAX_GRANULARITY)
    while granularity < MAX_GRANULARITY and not is_storable(disk_size, granularity):
        granularity *= 2
    return granularity
