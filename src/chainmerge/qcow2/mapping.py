# SPDX-License-Identifier: Apache-2.0
"""What the L1 and L2 tables say: which guest bytes are where in the file.

Two independent readings of the same entries: :func:`iter_extents` works on whole
tables at once with numpy, :func:`chainmerge.qcow2.lookup.lookup` decodes a single entry. A
property test ties them together.

Rules are those of the qcow2 specification ("Cluster mapping", "Extended L2
Entries") and of QEMU 7.2 (``qcow2_get_host_offset``, ``qcow2_get_subcluster_type``).
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from chainmerge.arithmetic.arrays import BoolArray, IndexArray, U8Array, U32Array, U64Array
from chainmerge.qcow2.errors import BadEntry, BadOffset
from chainmerge.qcow2.extents import Extents, Kind, follows_guest
from chainmerge.qcow2.gather import PieceReader, read_ahead
from chainmerge.qcow2.header import SECTOR, SUBCLUSTERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.qcow2.header import Header
    from chainmerge.qcow2.image import Qcow2Image
    from chainmerge.qcow2.l2_tables import TablesRead

__all__ = [
    "ALL_ALLOCATED",
    "ALL_ZERO",
    "COMPRESSED",
    "COPIED",
    "DEFAULT_WINDOW",
    "L1_RESERVED",
    "L2_RESERVED",
    "OFFSET_MASK",
    "ZERO_FLAG",
    "Extents",
    "Kind",
    "compressed_place",
    "iter_extents",
]

OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
L1_RESERVED = 0x7F00_0000_0000_01FF
L2_RESERVED = 0x3F00_0000_0000_01FE
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO_FLAG = 1
ALL_ALLOCATED = 0x0000_0000_FFFF_FFFF
ALL_ZERO = 0xFFFF_FFFF_0000_0000

DEFAULT_WINDOW = 1 << 20
_WINDOWS_AHEAD = 4
# An entry with mixed subclusters becomes up to 32 extents; this many of them at a time
# keep the arrays of one window to a few MiB.
MAX_MIXED_ENTRIES = 4096
# With fewer than one in so many entries in use, to pick them out costs less than it saves.
SPARSE = 4
_ENTRIES_TOGETHER = 4096


def iter_extents(
    image: Qcow2Image,
    start: int = 0,
    end: int | None = None,
    *,
    window: int = DEFAULT_WINDOW,
    reader: PieceReader | None = None,
    noted: TablesRead | None = None,
) -> Iterator[Extents]:
    """Yield what the image says about guest bytes *start* to *end*.

    Args:
        image: the image; what its backing file says is not looked at.
        start: first guest byte, at any alignment.
        end: guest byte after the last one; the disk's end if None or beyond it.
        window: bytes of L2 tables to look at in one step. It bounds the memory in use to
            about 20 times as much.
        reader: reads the tables, if one is at hand.
        noted: takes note of what is read, for those who want to read the same tables.

    Yields:
        Extents that together cover the range without gaps. A run may be split where one
        window ends and the next begins. Stretches without L2 tables cost nothing.

    Raises:
        BadOffset: an L2 table or a cluster is where it cannot be.
        BadEntry: an entry means nothing.
    """
    header = image.header
    end = header.virtual_size if end is None else min(end, header.virtual_size)
    done = start
    reader = reader or PieceReader()
    windows = (
        _read_entries(image, reader, pieces, noted)
        for pieces in _table_pieces(image, start, end, window)
    )
    for entries in _together(windows):
        for portion in _portions(entries):
            runs = _decode(image, portion)
            reached = min(portion.guest_end, end)
            filled = _without_gaps(runs, min(done, runs.start))
            yield filled.clipped(done, reached).coalesced()
            done = reached
    if done < end:
        yield Extents.single(done, end, Kind.UNALLOCATED)


class _TablePieces(Struct, frozen=True):
    """Parts of L2 tables that are looked at together: one of each table, in guest order."""

    first_cluster: U64Array
    """Guest cluster index of each piece's first entry."""
    count: U64Array
    """Entries of each piece."""
    file_offset: U64Array


def _table_pieces(image: Qcow2Image, start: int, end: int, window: int) -> Iterator[_TablePieces]:
    if start >= end:
        return
    header = image.header
    first_cluster = start >> header.cluster_bits
    end_cluster = ((end - 1) >> header.cluster_bits) + 1
    first_table = first_cluster // header.l2_entries
    end_table = (end_cluster - 1) // header.l2_entries + 1
    tables = _l2_table_offsets(image, first_table, end_table)
    present = np.flatnonzero(tables)
    per_window = max(1, window // header.cluster_size)
    expected = 0
    for at in range(0, len(present), per_window):
        chosen = present[at : at + per_window]
        soon = present[expected : at + _WINDOWS_AHEAD * per_window]
        if len(soon) and window > header.cluster_size:
            read_ahead(image.readable, tables[soon], header.cluster_size)
            expected += len(soon)
        table_start = (chosen + first_table).astype(np.uint64) * np.uint64(header.l2_entries)
        table_end = table_start + np.uint64(header.l2_entries)
        piece_start = np.maximum(table_start, np.uint64(first_cluster))
        piece_end = np.minimum(table_end, np.uint64(end_cluster))
        skipped = (piece_start - table_start) * np.uint64(header.l2_entry_size)
        pieces = _TablePieces(piece_start, piece_end - piece_start, tables[chosen] + skipped)
        yield from _cut_table(header, pieces, window) if len(chosen) == 1 else (pieces,)


def _cut_table(header: Header, table: _TablePieces, window: int) -> Iterator[_TablePieces]:
    """Cut the single piece of *table* so that none is larger than *window* bytes."""
    most = max(1, window // header.l2_entry_size)
    first_cluster, count, file_offset = (
        int(table.first_cluster[0]),
        int(table.count[0]),
        int(table.file_offset[0]),
    )
    for at in range(0, count, most):
        yield _TablePieces(
            np.array([first_cluster + at], np.uint64),
            np.array([min(most, count - at)], np.uint64),
            np.array([file_offset + at * header.l2_entry_size], np.uint64),
        )


def _l2_table_offsets(image: Qcow2Image, first: int, end: int) -> U64Array:
    """File offsets of the L2 tables of L1 entries *first* to *end*, 0 if there is none."""
    header = image.header
    entries = image.read_l1(first, end)

    def bad(index: int, problem: str) -> NoReturn:
        guest = (first + index) * header.l2_entries * header.cluster_size
        raise BadEntry(image.name, "L1", guest, int(entries[index]), problem)

    if (index := _first(entries & np.uint64(L1_RESERVED) != 0)) is not None:
        bad(index, "reserved bits are set")
    offsets = entries & np.uint64(OFFSET_MASK)
    if (index := _first(offsets & np.uint64(header.cluster_size - 1) != 0)) is not None:
        problem = f"is not aligned to clusters of {header.cluster_size} bytes"
        raise BadOffset(image.name, "L2 table", int(offsets[index]), problem)
    space = max(0, image.readable.size - header.cluster_size)
    if (index := _first(offsets > np.uint64(space))) is not None:
        problem = f"is not within the file of {image.readable.size} bytes"
        raise BadOffset(image.name, "L2 table", int(offsets[index]), problem)
    # Without this, a small file could claim more tables than could ever be read.
    ordered = np.sort(offsets[offsets != 0])
    if (index := _first(ordered[1:] == ordered[:-1])) is not None:
        raise BadOffset(image.name, "L2 table", int(ordered[index]), "is used twice")
    return offsets


class _Entries(Struct, frozen=True):
    """L2 entries of consecutive pieces of tables, in guest order."""

    cluster_size: int
    offsets: U64Array
    """The entries, or their first halves where L2 entries are extended."""
    bitmaps: U64Array | None
    """Their second halves."""
    first_cluster: U64Array
    """Guest cluster index of each piece's first entry."""
    position: IndexArray
    """Where each piece starts in ``offsets``, ascending, the first at 0."""

    @property
    def guest_end(self) -> int:
        """Guest byte after the last entry's cluster, were the disk to reach so far."""
        behind = len(self.offsets) - int(self.position[-1])
        return (int(self.first_cluster[-1]) + behind) * self.cluster_size

    def clusters(self, positions: IndexArray) -> U64Array:
        """Guest cluster indexes of the entries at *positions*."""
        piece = np.searchsorted(self.position, positions, "right") - 1
        within = (positions - self.position[piece]).astype(np.uint64)
        return self.first_cluster[piece] + within

    def chosen(self, positions: IndexArray) -> _Entries:
        """The entries at *positions*, ascending and not empty, as pieces of neighbours."""
        clusters = self.clusters(positions)
        heads = np.flatnonzero(np.diff(clusters, prepend=clusters[:1]) != 1)
        return _Entries(
            self.cluster_size,
            self.offsets[positions],
            None if self.bitmaps is None else self.bitmaps[positions],
            clusters[heads],
            heads,
        ).as_numbers()

    def as_numbers(self) -> _Entries:
        """The same in the byte order of this machine."""
        bitmaps = None if self.bitmaps is None else self.bitmaps.astype(np.uint64)
        return replace(self, offsets=self.offsets.astype(np.uint64), bitmaps=bitmaps)

    def part(self, first: int, end: int) -> _Entries:
        """The entries at positions *first* to *end*."""
        head = int(np.searchsorted(self.position, first, "right")) - 1
        tail = int(np.searchsorted(self.position, end, "left"))
        first_cluster = self.first_cluster[head:tail].copy()
        first_cluster[0] += np.uint64(first - int(self.position[head]))
        return _Entries(
            self.cluster_size,
            self.offsets[first:end],
            None if self.bitmaps is None else self.bitmaps[first:end],
            first_cluster,
            np.maximum(self.position[head:tail] - first, 0),
        )


def _read_entries(
    image: Qcow2Image, reader: PieceReader, pieces: _TablePieces, noted: TablesRead | None
) -> _Entries:
    header = image.header
    sizes = pieces.count * np.uint64(header.l2_entry_size)
    data = reader.read(image.readable, pieces.file_offset, sizes)
    ends = np.cumsum(pieces.count).astype(np.intp)
    position = np.concatenate([[0], ends[:-1]])
    words = np.frombuffer(data, ">u8")
    entries = _Entries(
        header.cluster_size,
        words[0::2] if header.extended_l2 else words,
        words[1::2] if header.extended_l2 else None,
        pieces.first_cluster,
        position,
    )
    # What is zero is so in any byte order, and the machine's own is the fastest.
    in_use = np.frombuffer(data, np.uint64) != 0
    if header.extended_l2:
        in_use = in_use[0::2] | in_use[1::2]
    if noted is not None and (pieces.count == header.l2_entries).all():
        noted.note(pieces.file_offset, entries.offsets, entries.bitmaps, in_use)
    if np.count_nonzero(in_use) < len(in_use) // SPARSE:
        # The last one tells how far the tables reach, whether it is in use or not.
        in_use[-1] = True
        return entries.chosen(np.flatnonzero(in_use))
    return entries.as_numbers()


def _together(windows: Iterator[_Entries]) -> Iterator[_Entries]:
    """The entries of several windows as one, where few are in use; not those where none is.

    To decode some takes as long as to decode thousands.
    """
    held: list[_Entries] = []
    count = 0
    for entries in windows:
        if not entries.offsets.any() and (entries.bitmaps is None or not entries.bitmaps.any()):
            continue
        held.append(entries)
        count += len(entries.offsets)
        if count >= _ENTRIES_TOGETHER:
            yield _joined(held)
            held, count = [], 0
    if held:
        yield _joined(held)


def _joined(parts: Sequence[_Entries]) -> _Entries:
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.offsets) for part in parts[:-1])])
    bitmaps = [part.bitmaps for part in parts if part.bitmaps is not None]
    return _Entries(
        parts[0].cluster_size,
        np.concatenate([part.offsets for part in parts]),
        np.concatenate(bitmaps) if bitmaps else None,
        np.concatenate([part.first_cluster for part in parts]),
        np.concatenate([part.position + at for part, at in zip(parts, starts, strict=True)]),
    )


def _portions(entries: _Entries) -> Iterator[_Entries]:
    """Cut entries into portions that have at most MAX_MIXED_ENTRIES with mixed subclusters."""
    if entries.bitmaps is None:
        yield entries
        return
    cuts = np.flatnonzero(_is_mixed(entries.bitmaps))[MAX_MIXED_ENTRIES::MAX_MIXED_ENTRIES]
    edges = [0, *cuts.tolist(), len(entries.offsets)]
    for first, end in pairwise(edges):
        yield entries.part(first, end)


def _is_mixed(bitmaps: U64Array) -> BoolArray:
    mixed: BoolArray = bitmaps != 0
    mixed &= bitmaps != np.uint64(ALL_ALLOCATED)
    mixed &= bitmaps != np.uint64(ALL_ZERO)
    return mixed


def _decode(image: Qcow2Image, entries: _Entries) -> Extents:
    """Turn entries into extents, in guest order, with gaps where there are no tables."""
    starts = _run_starts(image.header, entries)
    ends = np.append(starts[1:], len(entries.offsets))
    clusters = entries.clusters(starts)
    runs = _Runs(
        guest=clusters << np.uint64(image.header.cluster_bits),
        length=(ends - starts).astype(np.uint64) << np.uint64(image.header.cluster_bits),
        entry=entries.offsets[starts],
        last_entry=entries.offsets[ends - 1],
        bitmap=None if entries.bitmaps is None else entries.bitmaps[starts],
    )
    _refuse_bad_runs(image, runs)
    extents = _classify(image.header, runs)
    return extents if runs.bitmap is None else _split_mixed(image.header, runs, extents)


def _run_starts(header: Header, entries: _Entries) -> IndexArray:
    """Positions of entries that start a run.

    In a run each entry is the one before it plus one cluster, so that its first and last
    entry tell everything about it. An image with little fragmentation comes down to
    few runs here, with hardly more work than reading its tables.
    """
    step = np.uint64(header.cluster_size)
    breaks = entries.offsets[1:] - entries.offsets[:-1] != step
    if entries.bitmaps is not None:
        breaks |= entries.bitmaps[1:] != entries.bitmaps[:-1]
        breaks |= _is_mixed(entries.bitmaps[1:])
    jumps = entries.first_cluster[1:] != entries.clusters(entries.position[1:] - 1) + np.uint64(1)
    breaks[entries.position[1:][jumps] - 1] = True
    starts = np.concatenate([[0], np.flatnonzero(breaks) + 1])

    # Entries without a host offset, and compressed ones, do not count up; where they seem to,
    # each entry stands for itself.
    first = entries.offsets[starts]
    lone = (first & np.uint64(COMPRESSED) != 0) | (first & np.uint64(OFFSET_MASK) == 0)
    longer = np.append(starts[1:], len(entries.offsets)) - starts > 1
    if (lone & longer).any():
        return np.arange(len(entries.offsets))
    return starts


class _Runs(Struct, frozen=True):
    """Runs of entries that count up by one cluster; see :func:`_run_starts`."""

    guest: U64Array
    length: U64Array
    entry: U64Array
    last_entry: U64Array
    bitmap: U64Array | None


def _refuse_bad_runs(image: Qcow2Image, runs: _Runs) -> None:
    header = image.header

    def refuse(bad: BoolArray, problem: str) -> None:
        if (index := _first(bad)) is not None:
            guest, entry = int(runs.guest[index]), int(runs.entry[index])
            raise BadEntry(image.name, "L2", guest, entry, problem)

    compressed = runs.entry & np.uint64(COMPRESSED) != 0
    plain = ~compressed
    offset = runs.entry & np.uint64(OFFSET_MASK)
    # Offsets that count up past the offset field spill into the reserved bits above it.
    reserved = (runs.entry | runs.last_entry) & np.uint64(L2_RESERVED) != 0
    refuse(plain & reserved, "reserved bits are set")
    zero_flag = plain & (runs.entry & np.uint64(ZERO_FLAG) != 0)
    if header.version < 3:
        refuse(zero_flag, "a zero flag in an image of version 2")
    if runs.bitmap is not None:
        refuse(zero_flag, "a zero flag in an extended entry")
        refuse(compressed & (runs.bitmap != 0), "a compressed cluster with subclusters")
        overlap = runs.bitmap & (runs.bitmap >> np.uint64(SUBCLUSTERS)) != 0
        refuse(overlap, "subclusters are both allocated and zero")
        homeless = plain & ~_has_host(header, runs.entry)
        allocated = runs.bitmap & np.uint64(ALL_ALLOCATED) != 0
        refuse(homeless & allocated, "subclusters are allocated in a cluster that is not")
    if header.external_data_file:
        refuse(compressed, "a compressed cluster in an image with an external data file")
        elsewhere = plain & _has_host(header, runs.entry) & (offset != runs.guest)
        refuse(elsewhere, "not at its guest offset in the external data file")
    unaligned = plain & (offset & np.uint64(header.cluster_size - 1) != 0)
    if (index := _first(unaligned)) is not None:
        problem = f"is not aligned to clusters of {header.cluster_size} bytes"
        raise BadOffset(image.name, "data cluster", int(offset[index]), problem)


def _has_host(header: Header, entry: U64Array) -> BoolArray:
    """Whether uncompressed entries name a cluster in the file.

    Offset 0 is the header's place, unless the data is in a file of its own; there the COPIED
    flag tells guest cluster 0 from one that is not allocated.
    """
    has_host: BoolArray = entry & np.uint64(OFFSET_MASK) != 0
    if header.external_data_file:
        has_host |= entry & np.uint64(COPIED) != 0
    return has_host


def _classify(header: Header, runs: _Runs) -> Extents:
    """Kinds and places of runs; those of extended entries as if no bitmap were mixed."""
    has_host = _has_host(header, runs.entry)
    if runs.bitmap is None:
        zero = runs.entry & np.uint64(ZERO_FLAG) != 0
        data = has_host
    else:
        zero = runs.bitmap == np.uint64(ALL_ZERO)
        data = runs.bitmap == np.uint64(ALL_ALLOCATED)
    kind = np.where(data, np.uint8(Kind.DATA), np.uint8(Kind.UNALLOCATED))
    kind[zero] = Kind.ZERO
    kind[zero & has_host] = Kind.ZERO_ALLOCATED
    compressed = runs.entry & np.uint64(COMPRESSED) != 0
    kind[compressed] = Kind.COMPRESSED

    host = np.where(follows_guest(kind), runs.entry & np.uint64(OFFSET_MASK), np.uint64(0))
    csize = np.zeros(len(kind), np.uint32)
    if compressed.any():
        host[compressed], csize[compressed] = compressed_place(header, runs.entry[compressed])
    return Extents(runs.guest, runs.length, kind, host, csize)


def compressed_place(header: Header, entry: U64Array) -> tuple[U64Array, U32Array]:
    """File offsets and sizes in bytes ("Compressed Clusters Descriptor" of the specification)."""
    offset_bits = 62 - (header.cluster_bits - 8)
    host = entry & np.uint64((1 << offset_bits) - 1)
    further_sectors = (entry & np.uint64(COMPRESSED - 1)) >> np.uint64(offset_bits)
    in_sector = host & np.uint64(SECTOR - 1)
    csize = (further_sectors + np.uint64(1)) * np.uint64(SECTOR) - in_sector
    return host, csize.astype(np.uint32)


def _split_mixed(header: Header, runs: _Runs, extents: Extents) -> Extents:
    """Replace each run whose subclusters differ (always a single cluster) by its subclusters."""
    assert runs.bitmap is not None
    mixed = _is_mixed(runs.bitmap)
    if not mixed.any():
        return extents
    pieces = np.where(mixed, SUBCLUSTERS, 1)
    source = np.repeat(np.arange(len(pieces)), pieces)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    within = (np.arange(len(source)) - first).astype(np.uint64) * np.uint64(header.subcluster_size)

    has_host = _has_host(header, runs.entry)
    kind = extents.kind[source]
    kind[mixed[source]] = _subcluster_kinds(runs.bitmap[mixed], has_host[mixed]).ravel()
    offset = (runs.entry & np.uint64(OFFSET_MASK))[source] + within
    host = np.where(follows_guest(kind), offset, extents.host[source])
    length = np.where(mixed, np.uint64(header.subcluster_size), extents.length)[source]
    return Extents(extents.guest[source] + within, length, kind, host, extents.csize[source])


def _subcluster_kinds(bitmap: U64Array, has_host: BoolArray) -> U8Array:
    """Kinds ``[len(bitmap), 32]`` of the subclusters of extended entries."""
    octets = bitmap.astype("<u8").view(np.uint8).reshape(-1, 8)
    bits = np.unpackbits(octets, axis=1, bitorder="little").astype(np.bool_)
    allocated, zero = bits[:, :SUBCLUSTERS], bits[:, SUBCLUSTERS:]
    kind = np.where(allocated, np.uint8(Kind.DATA), np.uint8(Kind.UNALLOCATED))
    zero_kind = np.where(has_host, np.uint8(Kind.ZERO_ALLOCATED), np.uint8(Kind.ZERO))
    return np.where(zero, zero_kind[:, np.newaxis], kind)


def _without_gaps(extents: Extents, start: int) -> Extents:
    """Put UNALLOCATED extents before and between extents where there is nothing."""
    previous_end = np.concatenate([[np.uint64(start)], (extents.guest + extents.length)[:-1]])
    gap = extents.guest - previous_end
    at = np.flatnonzero(gap)
    if not len(at):
        return extents
    return Extents(
        np.insert(extents.guest, at, previous_end[at]),
        np.insert(extents.length, at, gap[at]),
        np.insert(extents.kind, at, Kind.UNALLOCATED),
        np.insert(extents.host, at, 0),
        np.insert(extents.csize, at, 0),
    )


def _first(condition: BoolArray) -> int | None:
    """The first position where *condition* holds."""
    positions = np.flatnonzero(condition)
    return int(positions[0]) if len(positions) else None
