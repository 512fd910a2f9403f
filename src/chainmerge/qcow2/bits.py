# SPDX-License-Identifier: Apache-2.0
"""Dirty bitmaps in memory: immutable, and sparse by chunk.

A bit stands for ``granularity`` bytes of the guest's disk, counted from its start. The
serialised form is that of the qcow2 specification ("Bitmap data"): bit ``n`` is bit
``n % 8`` of byte ``n // 8``, and the bits behind the last one that the disk needs are zero.

A set is kept as chunks of 64 KiB of that form; a chunk without a bit is not kept at all and
one with all bits is shared, so a bitmap of a 10 TiB disk costs what its dirty parts cost.
Nothing here loops over bits or over the chunks that are absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from msgspec import Struct, field

from chainmerge.arithmetic.arrays import I64Array, U8Array, U64Array
from chainmerge.arithmetic.distinct import distinct
from chainmerge.arithmetic.rounding import divide_up

Bytes: TypeAlias = U8Array
Offsets: TypeAlias = U64Array

#: QEMU neither stores nor loads a bitmap with more serialised bytes (BME_MAX_PHYS_SIZE, 7.2).
MAX_PACKED_SIZE = 0x2000_0000

_CHUNK_BYTES = 64 * 1024
_CHUNK_BITS = 8 * _CHUNK_BYTES
_POPULATION = np.unpackbits(np.arange(256, dtype=np.uint8)[:, np.newaxis], axis=1).sum(
    axis=1, dtype=np.uint8
)


def _frozen(chunk: Bytes) -> Bytes:
    chunk.setflags(write=False)
    return chunk


_ALL_ONES = _frozen(np.full(_CHUNK_BYTES, 0xFF, dtype=np.uint8))
_NO_RANGES: Offsets = np.empty(0, dtype=np.uint64)


def bit_count(disk_size: int, granularity: int) -> int:
    """How many bits describe *disk_size* bytes at *granularity* bytes a bit."""
    return divide_up(disk_size, granularity)


def packed_size(disk_size: int, granularity: int) -> int:
    """How many bytes the serialised bits take."""
    return divide_up(bit_count(disk_size, granularity), 8)


def is_storable(disk_size: int, granularity: int) -> bool:
    """Whether QEMU would store such a bitmap (QEMU 7.2, ``check_constraints_on_bitmap``)."""
    return packed_size(disk_size, granularity) <= MAX_PACKED_SIZE


class BitSet(Struct, frozen=True, eq=False):
    """An immutable set of the dirty granules of a disk.

    Attributes:
        disk_size: bytes of the guest's disk that the set describes.
        granularity: bytes of the disk that one bit stands for, a power of two.

    Raises:
        ValueError: for a size below zero, a granularity that is not a power of two, or more
            bits than QEMU can store (:func:`is_storable`).
    """

    disk_size: int
    granularity: int
    # Chunk number to its bytes; the last chunk of the disk is cut at packed_size. No chunk
    # is all zeros, so equal sets have equal chunks.
    _chunks: Mapping[int, Bytes] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if self.disk_size < 0:
            raise ValueError(f"a disk cannot have {self.disk_size} bytes")
        if self.granularity < 1 or self.granularity & (self.granularity - 1):
            raise ValueError(f"a granularity of {self.granularity} bytes is not a power of two")
        if not is_storable(self.disk_size, self.granularity):
            raise ValueError(
                f"{self.disk_size} bytes at {self.granularity} bytes a bit need more bits than a "
                "bitmap can have"
            )

    # Making sets

    @classmethod
    def empty(cls, disk_size: int, granularity: int) -> BitSet:
        """The set without any bit."""
        return cls(disk_size, granularity)

    @classmethod
    def from_packed(
        cls, data: bytes | bytearray | memoryview | Bytes, disk_size: int, granularity: int
    ) -> BitSet:
        """The set with the serialised form *data*; bits behind the disk's end are dropped.

        Raises:
            ValueError: if *data* is not exactly ``packed_size`` bytes long.
        """
        packed = np.frombuffer(data, dtype=np.uint8)
        if len(packed) != packed_size(disk_size, granularity):
            raise ValueError(
                f"{len(packed)} bytes are not the bits of a disk of {disk_size} bytes "
                f"at {granularity} bytes a bit"
            )
        return cls.from_segments([(0, packed)], disk_size, granularity)

    @classmethod
    def from_segments(
        cls, segments: Iterable[tuple[int, Bytes]], disk_size: int, granularity: int
    ) -> BitSet:
        """The set whose serialised form has the *segments* and zeros elsewhere.

        Args:
            segments: (first byte, bytes) in ascending order, without overlaps. What lies
                behind the end of the serialised form is dropped, as are tail bits.
            disk_size: bytes of the disk.
            granularity: bytes a bit.
        """
        frame = cls(disk_size, granularity)
        chunks: dict[int, Bytes] = {}
        number, chunk = -1, _ALL_ONES
        for start, data in segments:
            taken = 0
            end = min(start + len(data), frame.packed_size)
            while start + taken < end:
                at = start + taken
                if at // _CHUNK_BYTES != number:
                    # Segments ascend: the chunk before is complete, and kept in its
                    # smallest form before the next one takes memory.
                    frame._compact(chunks, number)
                    number = at // _CHUNK_BYTES
                    chunk = chunks.setdefault(number, frame._blank(number))
                inside = at % _CHUNK_BYTES
                length = min(end - at, len(chunk) - inside)
                chunk[inside : inside + length] = data[taken : taken + length]
                taken += length
        frame._compact(chunks, number)
        return frame._with_chunks(chunks)

    @classmethod
    def from_ranges(
        cls, ranges: Iterable[tuple[int, int]], disk_size: int, granularity: int
    ) -> BitSet:
        """The set of all granules that some range of guest bytes touches.

        Args:
            ranges: (start, length) in bytes, in any order, overlapping or not.
            disk_size: bytes of the disk.
            granularity: bytes a bit.

        Raises:
            ValueError: if a range does not lie on the disk.
        """
        pairs = list(ranges)
        if any(start < 0 or length < 0 or start + length > disk_size for start, length in pairs):
            raise ValueError(f"a range is not on the disk of {disk_size} bytes")
        starts = np.array([start for start, _ in pairs], dtype=np.uint64)
        lengths = np.array([length for _, length in pairs], dtype=np.uint64)
        return cls.from_range_arrays(starts, lengths, disk_size, granularity)

    @classmethod
    def from_range_arrays(
        cls, starts: Offsets, lengths: Offsets, disk_size: int, granularity: int
    ) -> BitSet:
        """As :meth:`from_ranges`, with the ranges in two arrays of equal length.

        Raises:
            ValueError: if a range does not lie on the disk.
        """
        frame = cls(disk_size, granularity)
        size = np.uint64(disk_size)
        if bool(np.any((starts > size) | (lengths > size - np.minimum(starts, size)))):
            raise ValueError(f"a range is not on the disk of {disk_size} bytes")
        builder = _RunCollector(frame)
        builder.add(*_touched_granules(starts, lengths, granularity))
        return builder.finish()

    # Facts

    @property
    def bits(self) -> int:
        """How many bits the disk needs."""
        return bit_count(self.disk_size, self.granularity)

    @property
    def packed_size(self) -> int:
        """How many bytes the serialised form has."""
        return packed_size(self.disk_size, self.granularity)

    @property
    def is_empty(self) -> bool:
        """Whether no bit is set."""
        return not self._chunks

    def count(self) -> int:
        """How many bits are set."""
        return sum(
            8 * len(chunk) if chunk is _ALL_ONES else int(_POPULATION[chunk].sum(dtype=np.int64))
            for chunk in self._chunks.values()
        )

    def dirty_bytes(self) -> int:
        """How many bytes of the disk the set bits stand for, the last one cut at its end."""
        overshoot = self.bits * self.granularity - self.disk_size
        return self.count() * self.granularity - (overshoot if self._has_last_bit() else 0)

    def covers(self, other: BitSet) -> bool:
        """Whether every bit of *other* is set here too.

        Raises:
            ValueError: if the two have not the same disk size and granularity.
        """
        self._require_same_geometry(other)
        for number, chunk in other._chunks.items():
            mine = self._chunks.get(number)
            if mine is None or (mine is not chunk and bool(np.any(chunk & ~mine))):
                return False
        return True

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BitSet):
            return NotImplemented
        return (
            (self.disk_size, self.granularity) == (other.disk_size, other.granularity)
            and self._chunks.keys() == other._chunks.keys()
            and all(
                chunk is other._chunks[number] or np.array_equal(chunk, other._chunks[number])
                for number, chunk in self._chunks.items()
            )
        )

    def __hash__(self) -> int:
        return hash((self.disk_size, self.granularity, frozenset(self._chunks)))

    # Serialised form

    def to_packed(self) -> Bytes:
        """The serialised form: uint8[packed_size], tail bits zero."""
        return self.packed_range(0, self.packed_size)

    def packed_range(self, byte_start: int, byte_length: int) -> Bytes:
        """A part of the serialised form, uint8[byte_length].

        Zeros beyond ``packed_size``, so that a part can be as long as the cluster it goes to.
        """
        result = np.zeros(byte_length, dtype=np.uint8)
        first = byte_start // _CHUNK_BYTES
        last = divide_up(byte_start + byte_length, _CHUNK_BYTES)
        for number in self._stored_between(first, last):
            chunk = self._chunks[number]
            base = number * _CHUNK_BYTES
            low = max(byte_start, base)
            high = min(byte_start + byte_length, base + len(chunk))
            if low < high:
                result[low - byte_start : high - byte_start] = chunk[low - base : high - base]
        return result

    def dirty_parts(self, part_size: int) -> Offsets:
        """Which parts of *part_size* serialised bytes have a bit set: uint64, ascending.

        With the cluster size of an image this names the bitmap clusters that need storing.
        """
        found: list[Offsets] = []
        for number in sorted(self._chunks):
            at = np.flatnonzero(self._chunks[number]) + number * _CHUNK_BYTES
            found.append(distinct(at // part_size).astype(np.uint64))
        # Parts larger than a chunk are found once for each of their chunks.
        return distinct(np.concatenate(found)) if found else _NO_RANGES

    # Ranges

    def iter_ranges(self) -> Iterator[tuple[Offsets, Offsets]]:
        """Dirty ranges as (starts, lengths) in guest bytes, one pair of arrays a stored chunk.

        Ascending; a range may go on in the next pair. Bounded memory also for a bitmap whose
        every other bit is set, where :meth:`ranges` takes 64 times the serialised form.
        """
        for number in sorted(self._chunks):
            first, end = _runs_of_chunk(self._chunks[number])
            base = np.uint64(number * _CHUNK_BITS)
            unit = np.uint64(self.granularity)
            starts = (first + base) * unit
            ends = np.minimum((end + base) * unit, np.uint64(self.disk_size))
            yield starts, ends - starts

    def ranges(self) -> tuple[Offsets, Offsets]:
        """All dirty ranges, maximal and ascending: (starts, lengths), uint64 guest bytes."""
        pairs = list(self.iter_ranges())
        if not pairs:
            return _NO_RANGES, _NO_RANGES
        starts = np.concatenate([pair[0] for pair in pairs])
        ends = starts + np.concatenate([pair[1] for pair in pairs])
        opens = np.concatenate(([True], starts[1:] != ends[:-1]))
        closes = np.concatenate((opens[1:], [True]))
        return starts[opens], ends[closes] - starts[opens]

    # Sets from sets

    def union(self, other: BitSet) -> BitSet:
        """The bits that are set in either.

        Raises:
            ValueError: if the two have not the same disk size and granularity.
        """
        self._require_same_geometry(other)
        chunks = dict(self._chunks)
        for number, chunk in other._chunks.items():
            mine = chunks.get(number)
            chunks[number] = chunk if mine is None else _smallest(mine | chunk)
        return self._with_chunks(chunks)

    def with_disk_size(self, disk_size: int) -> BitSet:
        """The same bits for a disk of another size: cut at its end, or extended with clean ones.

        A set bit that reached over the old end of the disk stands for a full granule after it.
        """
        frame = BitSet(disk_size, self.granularity)
        chunks: dict[int, Bytes] = {}
        for number in self._stored_between(0, frame._chunk_count):
            chunk = self._chunks[number]
            if len(chunk) == frame._chunk_length(number) and number != frame._chunk_count - 1:
                chunks[number] = chunk
                continue
            resized = frame._blank(number)
            kept = min(len(chunk), len(resized))
            resized[:kept] = chunk[:kept]
            chunks[number] = resized
            frame._compact(chunks, number)
        return frame._with_chunks(chunks)

    def with_granularity(self, granularity: int) -> BitSet:
        """The same dirty bytes at another granularity.

        A finer set has every bit that lies in a dirty granule; a coarser one has a bit where
        any of the finer bits is set.
        """
        if granularity == self.granularity:
            return self
        builder = _RunCollector(BitSet(self.disk_size, granularity))
        for starts, lengths in self.iter_ranges():
            builder.add(*_touched_granules(starts, lengths, granularity))
        return builder.finish()

    def with_geometry(self, disk_size: int, granularity: int) -> BitSet:
        """The same dirty bytes on a disk of another size, at another granularity.

        The order of the two steps is the one that dirties nothing in vain: the end of the
        disk is where it is known best at the finer of the granularities.
        """
        if granularity < self.granularity:
            return self.with_granularity(granularity).with_disk_size(disk_size)
        return self.with_disk_size(disk_size).with_granularity(granularity)

    # Chunks

    @property
    def _chunk_count(self) -> int:
        return divide_up(self.packed_size, _CHUNK_BYTES)

    def _chunk_length(self, number: int) -> int:
        return min(_CHUNK_BYTES, self.packed_size - number * _CHUNK_BYTES)

    def _blank(self, number: int) -> Bytes:
        return np.zeros(self._chunk_length(number), dtype=np.uint8)

    def _stored_between(self, first: int, end: int) -> list[int]:
        if end - first < len(self._chunks):
            return [number for number in range(first, end) if number in self._chunks]
        return sorted(number for number in self._chunks if first <= number < end)

    def _compact(self, chunks: dict[int, Bytes], number: int) -> None:
        """Bring a freshly written chunk into its canonical form: no tail bits, not if empty."""
        chunk = chunks.get(number)
        if chunk is None:
            return
        if number == self._chunk_count - 1 and self.bits % 8:
            chunk[-1] &= (1 << self.bits % 8) - 1
        if not chunk.any():
            del chunks[number]
        else:
            chunks[number] = _smallest(chunk)

    def _with_chunks(self, chunks: dict[int, Bytes]) -> BitSet:
        return BitSet(self.disk_size, self.granularity, MappingProxyType(chunks))

    def _has_last_bit(self) -> bool:
        chunk = self._chunks.get(self._chunk_count - 1)
        return chunk is not None and bool(chunk[-1] >> ((self.bits - 1) % 8) & 1)

    def _require_same_geometry(self, other: BitSet) -> None:
        if (self.disk_size, self.granularity) != (other.disk_size, other.granularity):
            raise ValueError(f"{self} and {other} do not describe the same granules")


def union_all(bitsets: Iterable[BitSet], disk_size: int, granularity: int) -> BitSet:
    """The union of sets of any geometry, for a disk of *disk_size* bytes at *granularity*.

    Granules beyond the end of a set's own disk count as clean.
    """
    result = BitSet.empty(disk_size, granularity)
    for bitset in bitsets:
        result = result.union(bitset.with_geometry(disk_size, granularity))
    return result


class _RunCollector:
    """Collects runs of set bits into the chunks of a set that is being made."""

    def __init__(self, frame: BitSet) -> None:
        self._frame = frame
        self._chunks: dict[int, Bytes] = {}

    def add(self, first: Offsets, end: Offsets) -> None:
        """Set the bits ``first[i] <= bit < end[i]``; runs ascend and do not touch."""
        if not len(first):
            return
        limit = self._frame._chunk_count
        number = int(first[0]) // _CHUNK_BITS
        run = 0
        while run < len(first):
            # One step a chunk that has a set bit; the chunks between runs are jumped over.
            number = max(number, int(first[run]) // _CHUNK_BITS)
            assert number < limit
            base = np.uint64(number * _CHUNK_BITS)
            stop = int(np.searchsorted(first, base + np.uint64(_CHUNK_BITS)))
            low = np.maximum(first[run:stop], base) - base
            high = np.minimum(end[run:stop] - base, np.uint64(_CHUNK_BITS))
            self._add_to_chunk(number, low.astype(np.int64), high.astype(np.int64))
            number += 1
            goes_on = int(end[stop - 1]) > number * _CHUNK_BITS
            run = stop - 1 if goes_on else stop

    def _add_to_chunk(self, number: int, first: I64Array, end: I64Array) -> None:
        if first[0] == 0 and end[0] == _CHUNK_BITS:
            self._chunks[number] = _ALL_ONES
            return
        chunk = self._chunks.get(number)
        if chunk is _ALL_ONES:
            return
        if chunk is None:
            chunk = self._chunks[number] = self._frame._blank(number)
        _set_runs(chunk, first, end)

    def finish(self) -> BitSet:
        for number in list(self._chunks):
            if self._chunks[number] is not _ALL_ONES:
                self._frame._compact(self._chunks, number)
        return self._frame._with_chunks(self._chunks)


def _touched_granules(
    starts: Offsets, lengths: Offsets, granularity: int
) -> tuple[Offsets, Offsets]:
    """The granules that ranges touch, as (first, end) of maximal ascending runs of bits."""
    kept = lengths > 0
    if not kept.any():
        return _NO_RANGES, _NO_RANGES
    order = np.argsort(starts[kept], kind="stable")
    starts, lengths = starts[kept][order], lengths[kept][order]
    unit = np.uint64(granularity)
    first = starts // unit
    # Of overlapping ranges the one that starts first need not be the one that ends last.
    end = np.maximum.accumulate((starts + lengths - np.uint64(1)) // unit + np.uint64(1))
    opens = np.concatenate(([True], first[1:] > end[:-1]))
    closes = np.concatenate((opens[1:], [True]))
    return first[opens], end[closes]


def _runs_of_chunk(chunk: Bytes) -> tuple[Offsets, Offsets]:
    """The runs of set bits of a chunk as (first, end) in bits from its start."""
    if chunk is _ALL_ONES:
        return np.array([0], dtype=np.uint64), np.array([_CHUNK_BITS], dtype=np.uint64)
    bits = np.unpackbits(chunk, bitorder="little")
    changes = np.flatnonzero(np.diff(bits, prepend=np.uint8(0), append=np.uint8(0)))
    edges = changes.astype(np.uint64)
    return edges[0::2], edges[1::2]


def _set_runs(chunk: Bytes, first: I64Array, end: I64Array) -> None:
    """Set the bits of ascending, disjoint runs in a chunk."""
    first_byte, end_byte = first >> 3, end >> 3
    head = (0xFF << (first & 7)).astype(np.uint8)
    tail = ((1 << (end & 7)) - 1).astype(np.uint8)
    inside = first_byte == end_byte
    np.bitwise_or.at(chunk, first_byte[inside], head[inside] & tail[inside])
    across = ~inside
    np.bitwise_or.at(chunk, first_byte[across], head[across])
    ends_inside = across & (tail != 0)
    np.bitwise_or.at(chunk, end_byte[ends_inside], tail[ends_inside])
    steps = np.zeros(len(chunk) + 1, dtype=np.int32)
    np.add.at(steps, first_byte[across] + 1, 1)
    np.add.at(steps, end_byte[across], -1)
    chunk[np.cumsum(steps[:-1]) > 0] = 0xFF


def _smallest(chunk: Bytes) -> Bytes:
    """The chunk as it is kept: read-only, and shared when all of its bits are set."""
    if len(chunk) == _CHUNK_BYTES and chunk.min() == 0xFF:
        return _ALL_ONES
    return _frozen(chunk)
