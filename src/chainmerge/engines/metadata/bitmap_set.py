# SPDX-License-Identifier: Apache-2.0
"""A set of bitmaps as the clusters that store it: directory, tables and data.

Layout and limits are those of the specification ("Bitmaps") and of what QEMU 7.2
accepts when it opens an image (block/qcow2-bitmap.c).
"""

from __future__ import annotations

import struct
from collections import Counter
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.counting import counted
from chainmerge.arithmetic.rounding import divide_up
from chainmerge.engines.metadata.allocation import Allocation, Demand, slices_by
from chainmerge.engines.metadata.errors import BitmapSetUnfit
from chainmerge.engines.metadata.header import stored_name
from chainmerge.engines.metadata.writes import Piece, whole_clusters
from chainmerge.qcow2.bitmaps import (
    DIRTY_TRACKING,
    MAX_BITMAP_NAME_BYTES,
    MAX_BITMAPS,
    MAX_GRANULARITY_BITS,
    MIN_GRANULARITY_BITS,
    TABLE_ALL_ONES,
    TABLE_ENTRY_SIZE,
    BitmapEntry,
    BitmapFlag,
    bitmap_table_entries,
    directory_entry_size,
)
from chainmerge.qcow2.bits import BitSet
from chainmerge.qcow2.features import BitmapsExtension
from chainmerge.qcow2.header import Header
from chainmerge.qcow2.runs import NO_CLUSTERS, Clusters

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.arithmetic.arrays import BoolArray, U8Array


_MIN_GRANULARITY = 1 << MIN_GRANULARITY_BITS
_MAX_GRANULARITY = 1 << MAX_GRANULARITY_BITS
_DIRECTORY_ENTRY = struct.Struct(">QIIBBHI")
# Bits are looked at and copied in windows of this many serialised bytes.
_WINDOW_BYTES = 1 << 20


class StoredBitmap(Struct, frozen=True):
    """A bitmap as it shall stand in an image.

    Attributes:
        name: UTF-8 with surrogate escapes, 1 to 1023 bytes, unique in the image.
        bits: Of the image's present virtual size.
        flags: ``AUTO`` for one that records guest writes, or none: without it the bitmap
            is disabled, and with no bits either it is a tombstone.
    """

    name: str
    bits: BitSet
    flags: BitmapFlag

    @property
    def granularity(self) -> int:
        """Guest bytes a bit."""
        return self.bits.granularity


class KeptBitmap(Struct, frozen=True):
    """A bitmap of the image that stays in the clusters that it has.

    Only its entry in the directory is rewritten.

    Attributes:
        entry: As it stands in the image: readable, and of the disk's present size.
    """

    entry: BitmapEntry

    @property
    def name(self) -> str:
        """As in :class:`StoredBitmap`."""
        return self.entry.name

    @property
    def flags(self) -> BitmapFlag:
        """As in :class:`StoredBitmap`."""
        return self.entry.flags

    @property
    def granularity(self) -> int:
        """Guest bytes a bit."""
        return self.entry.granularity


AnyBitmap: TypeAlias = StoredBitmap | KeptBitmap


class _Shape(Struct, frozen=True):
    """Which clusters a bitmap takes.

    Attributes:
        entries: Length of its table.
        stored: Parts (of one cluster of serialised bits) that need a cluster, ascending.
        ones: Parts whose bits are all set, which the table alone can say.
        table_clusters: Length of the table in clusters.
    """

    entries: int
    stored: Clusters
    ones: Clusters
    table_clusters: int


class BitmapSetLayout(Struct, frozen=True):
    """What a set of bitmaps takes in an image, before it is decided where.

    Attributes:
        bitmaps: The set.
        header: Of the image.
        shapes: One a bitmap.
        directory_size: Bytes.
    """

    bitmaps: tuple[AnyBitmap, ...]
    header: Header
    shapes: tuple[_Shape, ...]
    directory_size: int

    @property
    def directory_clusters(self) -> int:
        """Length of the directory in clusters."""
        return divide_up(self.directory_size, self.header.cluster_size)

    @property
    def demand(self) -> Demand:
        """How many clusters the set takes."""
        lengths = [*(shape.table_clusters for shape in self.shapes)]
        if self.directory_clusters:
            lengths.append(self.directory_clusters)
        data = sum(len(shape.stored) for shape in self.shapes)
        return Demand(
            scattered=data + lengths.count(1),
            contiguous=tuple(length for length in lengths if length > 1),
        )


def lay_out(image: str, header: Header, bitmaps: Sequence[AnyBitmap]) -> BitmapSetLayout:
    """Work out what *bitmaps* take in the image.

    Raises:
        BitmapSetUnfit: the image cannot hold one of them, or not all of them.
    """
    encoded = [_encoded_name(image, bitmap) for bitmap in bitmaps]
    _check_set(image, header, bitmaps)
    return BitmapSetLayout(
        bitmaps=tuple(bitmaps),
        header=header,
        shapes=tuple(
            _shape(header, bitmap.bits)
            if isinstance(bitmap, StoredBitmap)
            else _Shape(bitmap.entry.table_size, NO_CLUSTERS, NO_CLUSTERS, 0)
            for bitmap in bitmaps
        ),
        directory_size=sum(directory_entry_size(len(name), 0) for name in encoded),
    )


def _check_set(image: str, header: Header, bitmaps: Sequence[AnyBitmap]) -> None:
    if len(bitmaps) > MAX_BITMAPS:
        raise BitmapSetUnfit(image, f"{len(bitmaps)} bitmaps are more than {MAX_BITMAPS}")
    if bitmaps and header.version < 3:
        raise BitmapSetUnfit(image, "an image of version 2 cannot hold bitmaps")
    if bitmaps and not header.virtual_size:
        raise BitmapSetUnfit(image, "a disk of 0 bytes cannot have bitmaps")
    for name, count in Counter(bitmap.name for bitmap in bitmaps).items():
        if count > 1:
            raise BitmapSetUnfit(image, f"the name {name!r} is used {counted(count, 'time')}")
    for bitmap in bitmaps:
        _check_bitmap(image, header, bitmap)


def _check_bitmap(image: str, header: Header, bitmap: AnyBitmap) -> None:
    def unfit(problem: str) -> BitmapSetUnfit:
        return BitmapSetUnfit(image, f"bitmap {bitmap.name!r}: {problem}")

    if isinstance(bitmap, KeptBitmap):
        if bitmap.entry.table_size != bitmap_table_entries(header, bitmap.granularity):
            raise unfit("it is for a disk of another size")
        return
    bits = bitmap.bits
    if bits.disk_size != header.virtual_size:
        raise unfit(f"it is for a disk of {bits.disk_size} bytes, not {header.virtual_size}")
    if not _MIN_GRANULARITY <= bits.granularity <= _MAX_GRANULARITY:
        allowed = f"{_MIN_GRANULARITY} to {_MAX_GRANULARITY}"
        raise unfit(f"its granularity is {bits.granularity} bytes, but must be {allowed}")
    if bitmap.flags & ~BitmapFlag.AUTO:
        raise unfit(f"its flags are {bitmap.flags!r}, but only AUTO can be stored")


def _encoded_name(image: str, bitmap: AnyBitmap) -> bytes:
    name = stored_name(bitmap.name, MAX_BITMAP_NAME_BYTES)
    if name is None:
        allowed = f"1 to {MAX_BITMAP_NAME_BYTES} bytes without NUL"
        raise BitmapSetUnfit(image, f"bitmap {bitmap.name!r}: its name must be {allowed}")
    return name


def _shape(header: Header, bits: BitSet) -> _Shape:
    cluster_size = header.cluster_size
    entries = bitmap_table_entries(header, bits.granularity)
    dirty = bits.dirty_parts(cluster_size).astype(np.int64)
    full = [_all_ones(rows) for _, rows in _windows(bits, dirty, cluster_size)]
    ones = np.concatenate(full) if full else np.zeros(0, dtype=np.bool_)
    return _Shape(
        entries=entries,
        stored=dirty[~ones],
        ones=dirty[ones],
        table_clusters=-(-entries * TABLE_ENTRY_SIZE // cluster_size),
    )


def _all_ones(rows: U8Array) -> BoolArray:
    full: BoolArray = rows.min(axis=1) == 0xFF
    return full


def _windows(
    bits: BitSet, parts: Clusters, cluster_size: int
) -> Iterator[tuple[Clusters, U8Array]]:
    """The serialised bits of *parts*, as (parts, uint8[parts, cluster size]), piece by piece."""
    per_window = max(1, _WINDOW_BYTES // cluster_size)
    for part in slices_by(parts, per_window):
        chosen = parts[part]
        low, high = int(chosen[0]), int(chosen[-1]) + 1
        packed = bits.packed_range(low * cluster_size, (high - low) * cluster_size)
        yield chosen, packed.reshape(-1, cluster_size)[chosen - low]


class PlacedBitmapSet(Struct, frozen=True):
    """A set of bitmaps and the clusters that it goes to.

    Attributes:
        layout: What there is to place.
        tables: First cluster of each bitmap's table.
        data: Clusters of all bitmaps' stored parts, in the order of the bitmaps.
        directory: First cluster of the directory; 0 without bitmaps.
    """

    layout: BitmapSetLayout
    tables: Clusters
    data: Clusters
    directory: int

    @property
    def extension(self) -> BitmapsExtension | None:
        """What the header has to say about the set; None for an empty one."""
        if not self.layout.bitmaps:
            return None
        return BitmapsExtension(
            count=len(self.layout.bitmaps),
            directory_size=self.layout.directory_size,
            directory_offset=self.directory * self.layout.header.cluster_size,
        )

    def pieces(self) -> Iterator[Piece]:
        """All clusters of the set with their content."""
        cluster_size = self.layout.header.cluster_size
        done = 0
        for bitmap, shape, table in zip(
            self.layout.bitmaps, self.layout.shapes, self.tables.tolist(), strict=True
        ):
            if isinstance(bitmap, KeptBitmap):
                continue
            data = self.data[done : done + len(shape.stored)]
            done += len(shape.stored)
            yield _run(table, whole_clusters(_table(shape, data, cluster_size), cluster_size))
            at = 0
            for parts, rows in _windows(bitmap.bits, shape.stored, cluster_size):
                yield data[at : at + len(parts)], rows
                at += len(parts)
        if self.layout.bitmaps:
            yield _run(self.directory, whole_clusters(self._directory(), cluster_size))

    def _directory(self) -> bytes:
        cluster_size = self.layout.header.cluster_size
        return b"".join(
            _directory_entry(bitmap, shape, table * cluster_size)
            for bitmap, shape, table in zip(
                self.layout.bitmaps, self.layout.shapes, self.tables.tolist(), strict=True
            )
        )


def place_bitmap_set(layout: BitmapSetLayout, allocation: Allocation) -> PlacedBitmapSet:
    """Hand out the allocated clusters, so that what is written together lies together."""
    pieces = iter(allocation.contiguous.tolist())
    scattered = allocation.scattered.expanded()
    tables = np.zeros(len(layout.shapes), dtype=np.int64)
    data: list[Clusters] = []
    used = 0
    for number, (bitmap, shape) in enumerate(zip(layout.bitmaps, layout.shapes, strict=True)):
        if isinstance(bitmap, KeptBitmap):
            tables[number] = bitmap.entry.table_offset // layout.header.cluster_size
        elif shape.table_clusters == 1:
            tables[number] = scattered[used]
            used += 1
        else:
            tables[number] = next(pieces)
        data.append(scattered[used : used + len(shape.stored)])
        used += len(shape.stored)
    directory = 0
    if layout.directory_clusters == 1:
        directory = int(scattered[used])
        used += 1
    elif layout.directory_clusters:
        directory = next(pieces)
    assert used == len(scattered)
    placed = np.concatenate(data) if data else np.zeros(0, dtype=np.int64)
    return PlacedBitmapSet(layout, tables, placed, directory)


def _run(first: int, rows: U8Array) -> Piece:
    return np.arange(first, first + len(rows), dtype=np.int64), rows


def _table(shape: _Shape, data: Clusters, cluster_size: int) -> bytes:
    table = np.zeros(shape.entries, dtype=">u8")
    table[shape.ones] = TABLE_ALL_ONES
    table[shape.stored] = data * cluster_size
    return table.tobytes()


def _directory_entry(bitmap: AnyBitmap, shape: _Shape, table_offset: int) -> bytes:
    name = bitmap.name.encode("utf-8", "surrogateescape")
    entry = _DIRECTORY_ENTRY.pack(
        table_offset,
        shape.entries,
        int(bitmap.flags),
        DIRTY_TRACKING,
        bitmap.granularity.bit_length() - 1,
        len(name),
        0,
    )
    return (entry + name).ljust(directory_entry_size(len(name), 0), b"\0")
