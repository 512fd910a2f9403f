# SPDX-License-Identifier: Apache-2.0
"""Which parts of a file or a thin volume have space of their own; what writing to others takes.

A write into a hole takes space from the file system, and so does one to blocks that another file
shares, or on a file system that never writes to the old place (Btrfs). Of a thin volume nothing
counts as its own (:mod:`chainmerge.storage.thin`). All are in bytes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.arrays import BoolArray, I64Array
from chainmerge.arithmetic.distinct import distinct
from chainmerge.arithmetic.rounding import divide_up
from chainmerge.storage import allocation, lvm
from chainmerge.storage.extents import raw_data_extents
from chainmerge.storage.thin import pool_of
from chainmerge.storage.transfer import offload

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from chainmerge.storage.locks import AnyFile


class ByteRanges(Struct, frozen=True):
    """Ranges of a file: int64 arrays of equal length, in bytes, ascending and disjoint."""

    start: I64Array
    end: I64Array

    @property
    def total(self) -> int:
        """Bytes in all ranges."""
        return int((self.end - self.start).sum())

    def __len__(self) -> int:
        """Return the number of ranges."""
        return len(self.start)

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Offset and length of each."""
        yield from zip(self.start.tolist(), (self.end - self.start).tolist(), strict=True)

    def before(self, end: int) -> ByteRanges:
        """The parts before an offset."""
        kept = self.start < end
        return ByteRanges(self.start[kept], np.minimum(self.end[kept], end))

    def without(self, others: ByteRanges) -> ByteRanges:
        """The parts that are in none of *others*."""
        if not len(self) or not len(others):
            return self
        cuts = distinct(np.concatenate([self.start, self.end, others.start, others.end]))
        chosen = _contain(self, cuts) & ~_contain(others, cuts)
        first = np.flatnonzero(chosen)
        # What contains a cut goes on to the next one, and there is one behind the last range.
        return united([(cuts[first], cuts[first + 1])])


NO_RANGES = ByteRanges(np.zeros(0, np.int64), np.zeros(0, np.int64))


def _contain(ranges: ByteRanges, offsets: I64Array) -> BoolArray:
    index = np.searchsorted(ranges.start, offsets, "right") - 1
    inside: BoolArray = (index >= 0) & (offsets < ranges.end[index])
    return inside


def united(parts: Iterable[tuple[I64Array, I64Array]]) -> ByteRanges:
    """Starts and ends of ranges in any order, as one; those that touch or overlap are joined."""
    every = list(parts)
    if not every:
        return NO_RANGES
    start = np.concatenate([part for part, _ in every]).astype(np.int64)
    end = np.concatenate([part for _, part in every]).astype(np.int64)
    kept = end > start
    # Only how many ranges are open matters, so that starts and ends need not stay in pairs.
    start, end = np.sort(start[kept]), np.sort(end[kept])
    if not len(start):
        return NO_RANGES
    gaps = start[1:] > end[:-1]
    return ByteRanges(start[np.concatenate(([True], gaps))], end[np.concatenate((gaps, [True]))])


class FileSpace(Struct, frozen=True):
    """What a regular file has of its own.

    Attributes:
        own: Where writing takes no space of the file system.
        held: Where it has space, its own or shared. Elsewhere are holes.
        unit: Bytes that are given at once.

    Both reach beyond the file's end where something is reserved there.
    """

    own: ByteRanges
    held: ByteRanges
    unit: int = 1

    def missing(self, written: ByteRanges) -> int:
        """Bytes that have to be given for what is going to be written."""
        lacking = written.without(self.own)
        if self.unit == 1:
            return lacking.total
        start = lacking.start // self.unit * self.unit
        return united([(start, divide_up(lacking.end, self.unit) * self.unit)]).total

    def holes(self, ranges: ByteRanges) -> ByteRanges:
        """What of *ranges* is holes."""
        return ranges.without(self.held)


def space_of(file: AnyFile) -> FileSpace | None:
    """Which parts of an open file have space of their own; None for a block device.

    Where the file system does not tell (tmpfs, NFS), what reads as data counts as its own: then
    more may be missing than is said.

    Raises:
        ReadFailed: the storage reported an error.
    """
    if file.is_block_device:
        return None
    copies = _writes_elsewhere(file)
    try:
        extents = list(allocation.allocated_extents(file.fd))
    except OSError:
        held = _data_of(file)
        return FileSpace(NO_RANGES if copies else held, held)
    # What was reserved and never written to is written where it is, once.
    own = _ranges(
        (start, end)
        for start, end, flags in extents
        if not flags & allocation.SHARED and (not copies or flags & allocation.UNWRITTEN)
    )
    held = _ranges((start, end) for start, end, _ in extents)
    return FileSpace(own, held)


def space_to_count(file: AnyFile) -> FileSpace | None:
    """What of a file, or of a thin volume, takes no space when it is written to.

    None of another block device, which has all its space.

    Raises:
        ReadFailed, NotALogicalVolume, LvmMissing, LvmFailed: nobody tells.
    """
    if not file.is_block_device:
        return space_of(file)
    device = lvm.device_mapper_name(os.fstat(file.fd).st_rdev)
    pool = None if device is None else pool_of(file.name, lvm.find_by_device(file.name, device))
    return None if pool is None else FileSpace(NO_RANGES, NO_RANGES, pool.chunk)


def _ranges(pairs: Iterable[tuple[int, int]]) -> ByteRanges:
    bounds = np.array(list(pairs), dtype=np.int64).reshape(-1, 2)
    return united([(bounds[:, 0], bounds[:, 1])])


def _data_of(file: AnyFile) -> ByteRanges:
    status = os.fstat(file.fd)
    if status.st_blocks * allocation.STAT_BLOCK >= status.st_size:
        return _ranges([(0, status.st_size)])
    return _ranges((start, start + length) for start, length in raw_data_extents(file))


def _writes_elsewhere(file: AnyFile) -> bool:
    """Whether the file system gives every write a new place."""
    try:
        return offload.copies_on_write(file.fd)
    except OSError:
        return False
