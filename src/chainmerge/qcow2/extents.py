# SPDX-License-Identifier: Apache-2.0
"""Runs of the guest's disk as arrays, and what can be done with them."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.arrays import BoolArray, IndexArray, U8Array, U32Array, U64Array

if TYPE_CHECKING:
    from collections.abc import Sequence


class Kind(IntEnum):
    """What an image says about a piece of the guest's disk."""

    UNALLOCATED = 0
    """Nothing: the backing file decides, or it reads as zeros."""
    DATA = 1
    ZERO = 2
    """Zeros, without a cluster in the file."""
    ZERO_ALLOCATED = 3
    """Zeros, with a cluster in the file whose content does not matter."""
    COMPRESSED = 4


class Extents(Struct, frozen=True):
    """Runs of the guest's disk: arrays of equal length, sorted by guest offset.

    What :func:`~chainmerge.qcow2.mapping.iter_extents` yields has no gaps, and neighbours
    that continue each other (same kind, and host offsets that follow where there are any)
    are one extent; compressed clusters are never joined.
    """

    guest: U64Array
    """Bytes."""
    length: U64Array
    """Bytes."""
    kind: U8Array
    """Values of :class:`Kind`."""
    host: U64Array
    """File offset in bytes of DATA, ZERO_ALLOCATED and COMPRESSED; else 0. That of COMPRESSED is
    where the cluster's compressed data starts, even if the extent is only a part of the
    cluster."""
    csize: U32Array
    """COMPRESSED: bytes up to the end of the last 512-byte sector of compressed data; else 0."""

    def __len__(self) -> int:
        """Return the number of extents."""
        return len(self.guest)

    @property
    def start(self) -> int:
        """First guest byte."""
        return int(self.guest[0])

    @property
    def end(self) -> int:
        """Guest byte after the last one."""
        return int(self.guest[-1] + self.length[-1])

    @staticmethod
    def single(start: int, end: int, kind: Kind) -> Extents:
        """One extent without host offset."""
        return Extents(
            np.array([start], np.uint64),
            np.array([end - start], np.uint64),
            np.array([kind], np.uint8),
            np.zeros(1, np.uint64),
            np.zeros(1, np.uint32),
        )

    def take(self, chosen: IndexArray | slice) -> Extents:
        """The extents at the given positions."""
        return Extents(
            self.guest[chosen],
            self.length[chosen],
            self.kind[chosen],
            self.host[chosen],
            self.csize[chosen],
        )

    def clipped(self, start: int, end: int) -> Extents:
        """What of these extents lies from guest byte *start* to *end*.

        They must be without gaps and reach over both ends of that range.
        """
        if start <= self.start and self.end <= end:
            return self
        first = int(np.searchsorted(self.guest, np.uint64(start), "right")) - 1
        last = int(np.searchsorted(self.guest, np.uint64(end), "left"))
        kept = self.take(slice(first, last))
        guest = np.maximum(kept.guest, np.uint64(start))
        stop = np.minimum(kept.guest + kept.length, np.uint64(end))
        host = np.where(follows_guest(kept.kind), kept.host + (guest - kept.guest), kept.host)
        return Extents(guest, stop - guest, kept.kind, host, kept.csize)

    def cut_at(self, bounds: U64Array) -> Extents:
        """The same in the extents that start at *bounds*.

        *bounds* is ascending and holds the starts of all extents; they must be without gaps.
        """
        index = np.searchsorted(self.guest, bounds, "right") - 1
        kind = self.kind[index]
        moved = np.where(follows_guest(kind), bounds - self.guest[index], np.uint64(0))
        length = np.diff(bounds, append=np.uint64(self.end))
        return Extents(bounds, length, kind, self.host[index] + moved, self.csize[index])

    def continues(self) -> BoolArray:
        """For each extent but the first: whether it continues the one before it."""
        hostless = (self.kind == Kind.UNALLOCATED) | (self.kind == Kind.ZERO)
        host_end = np.where(hostless, self.host, self.host + self.length)
        result: BoolArray = self.kind[1:] == self.kind[:-1]
        result &= self.kind[1:] != Kind.COMPRESSED
        result &= (self.guest + self.length)[:-1] == self.guest[1:]
        result &= host_end[:-1] == self.host[1:]
        return result

    def joined_at(self, heads: IndexArray) -> Extents:
        """Each extent at *heads* joined with those that follow it up to the next of them."""
        if len(heads) == len(self):
            return self
        length = np.add.reduceat(self.length, heads)
        joined = self.take(heads)
        return Extents(joined.guest, length, joined.kind, joined.host, joined.csize)

    def coalesced(self) -> Extents:
        """The same with neighbours joined that continue each other."""
        return self.joined_at(np.concatenate([[0], np.flatnonzero(~self.continues()) + 1]))


def concatenated_extents(parts: Sequence[Extents]) -> Extents:
    """All extents of *parts*, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    return Extents(
        np.concatenate([part.guest for part in parts]),
        np.concatenate([part.length for part in parts]),
        np.concatenate([part.kind for part in parts]),
        np.concatenate([part.host for part in parts]),
        np.concatenate([part.csize for part in parts]),
    )


def follows_guest(kind: U8Array) -> BoolArray:
    """Whether host offsets grow with guest offsets within an extent."""
    follows: BoolArray = (kind == Kind.DATA) | (kind == Kind.ZERO_ALLOCATED)
    return follows


class Mapping(Struct, frozen=True):
    """What one L2 entry says about one cluster or subcluster; units as in :class:`Extents`."""

    guest: int
    length: int
    kind: Kind
    host: int
    csize: int
