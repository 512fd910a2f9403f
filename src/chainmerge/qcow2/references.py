# SPDX-License-Identifier: Apache-2.0
"""How often each cluster of an image's file is used, counted from all of its tables.

The counts are those of QEMU 7.2 (``calculate_refcounts`` in block/qcow2-refcount.c), also
for damaged images: what cannot be used is a corruption and not counted, everything else
is. In two points this goes further. An L2 table that several L1 entries share is read
once, so that a small file cannot claim more work than its size allows; and clusters of
metadata that something else uses too are reported as overlaps even if the stored refcounts
agree with that.

Memory is one count and one byte of marks for each cluster of the *file*, whatever the
tables claim; pages of them that nothing refers to are never touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from msgspec import Struct, field

from chainmerge.arithmetic.counting import counted
from chainmerge.arithmetic.distinct import distinct_with_counts
from chainmerge.arithmetic.rounding import divide_up, round_up
from chainmerge.qcow2 import bitmaps, mapping, refcounts
from chainmerge.qcow2.gather import PieceReader
from chainmerge.qcow2.header import MAX_L1_BYTES, SECTOR
from chainmerge.qcow2.l2_tables import NO_TABLES, KnownTables, L2Group, L2Tables
from chainmerge.qcow2.snapshots import SnapshotTable, read_snapshot_table
from chainmerge.qcow2.table_errors import (
    BadBitmapDirectory,
    BadBitmapTable,
    BadSnapshotTable,
    TooLittleMemory,
    TooManyClusters,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from chainmerge.arithmetic.arrays import BoolArray, I64Array, U64Array
    from chainmerge.qcow2.image import Qcow2Image
    from chainmerge.qcow2.refcounts import StoredRefcounts

Counts: TypeAlias = "npt.NDArray[np.unsignedinteger[Any]]"

#: QEMU checks no file of more clusters (``qcow2_check_refcounts``).
MAX_CLUSTERS = 2**31 - 1
MAX_MESSAGES = 100
_L1_ENTRY_SIZE = 8

# Snapshots of version 3 images must say their disk's size (specification, "Snapshots").
_MIN_V3_SNAPSHOT_EXTRA = 16
_L2_WINDOW_BYTES = 1 << 20
_CLUSTERS_AT_ONCE = 1 << 20
_COPIED_PROBLEM = "the COPIED flag contradicts the refcount"

# Marks of a cluster.
_STORED_IS_ONE = 1
_EXCLUSIVE = 2
_L2_TABLE = 4


class ReferenceCounts(Struct, frozen=True):
    """How often each cluster of the file is used, as counted from the tables.

    Attributes:
        cluster_size: bytes.
        counts: one count for each cluster that the file has or that something refers to
            (which may be one more), read-only, uint16 or uint32. Counts stop at the largest
            refcount that the image can store.
        complete: whether all tables could be read; otherwise a cluster with count 0 may be
            in use nevertheless.
    """

    cluster_size: int
    counts: Counts
    complete: bool

    def of(self, first: int, count: int) -> U64Array:
        """The counts of clusters *first* to *first + count*, 0 behind the end of the file."""
        result = np.zeros(count, dtype=np.uint64)
        known = self.counts[first : first + count]
        result[: len(known)] = known
        return result


class Findings(Struct):
    """What is wrong with an image, as it is found."""

    corruptions: int = 0
    overlaps: int = 0
    copied_mismatches: int = 0
    complete: bool = True
    messages: list[str] = field(default_factory=list)

    def note(self, message: str) -> None:
        """Keep a message, as long as there are not too many."""
        if len(self.messages) < MAX_MESSAGES:
            self.messages.append(message)

    def corrupt(self, count: int, message: str) -> None:
        """Record *count* corruptions of one kind, none if it is 0."""
        if count:
            self.corruptions += count
            self.note(message)

    def overlap(self, count: int, message: str) -> None:
        """Record that *count* references go to clusters of metadata."""
        if count:
            self.overlaps += count
            self.note(message)

    def incomplete(self, message: str) -> None:
        """Record a corruption because of which some references could not be counted."""
        self.complete = False
        self.corrupt(1, message)


def count_references(
    image: Qcow2Image,
    findings: Findings,
    stored: StoredRefcounts,
    tables: KnownTables = NO_TABLES,
) -> ReferenceCounts:
    """Count all references, and judge them on the way.

    Args:
        image: the image.
        findings: gets what is wrong.
        stored: the image's own refcounts.
        tables: what is known of the image's L2 tables, and not read again.

    Raises:
        TooManyClusters: the file is larger than QEMU would check.
    """
    return _Counting(image, findings, stored, tables).run()


def is_about_copied(message: str) -> bool:
    """Whether a message of :class:`Findings` is about COPIED flags."""
    return message.endswith(_COPIED_PROBLEM)


class _Counting:
    """The counts of one image while they are being made."""

    def __init__(
        self, image: Qcow2Image, findings: Findings, stored: StoredRefcounts, tables: KnownTables
    ) -> None:
        header = image.header
        self._image = image
        self._findings = findings
        self._stored = stored
        self._known = tables
        self._bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        # QEMU knows a file's length in whole sectors.
        self._file_end = round_up(image.readable.size, SECTOR)
        self._clusters = divide_up(self._file_end, self._cluster_size)
        if self._clusters > MAX_CLUSTERS:
            raise TooManyClusters(image.name, self._clusters, MAX_CLUSTERS)
        width = min(32, header.refcount_bits)
        self._limit = (1 << width) - 1
        # A reference that is not aligned may reach into the cluster behind the last one.
        try:
            self._counts: Counts = np.zeros(self._clusters + 1, "u4" if width == 32 else "u2")
            self._marks = np.zeros(self._clusters + 1, np.uint8)
        except MemoryError as error:
            raise TooLittleMemory(image.name, self._clusters) from error

    def run(self) -> ReferenceCounts:
        self._mark_stored_ones()
        self._count_header()
        tables = self._count_l1_tables()
        self._count_bitmaps()
        blocks = self._count_refcount_blocks(self._stored.entries)
        self._count_l2_tables(tables)
        for group in tables.groups():
            self._count_data(group)
        shared = _count(self._counts[blocks] > 1)
        message = f"{counted(shared, 'refcount block')} in clusters that something else uses too"
        self._findings.corrupt(shared, message)
        end = self._clusters + int(self._counts[-1] > 0)
        counts = self._counts[:end]
        counts.setflags(write=False)
        return ReferenceCounts(self._cluster_size, counts, self._findings.complete)

    # What is not mapped by L2 tables

    def _mark_stored_ones(self) -> None:
        for first, stored in self._stored.windows(self._clusters):
            self._marks[first : first + len(stored)][stored == 1] |= _STORED_IS_ONE

    def _count_header(self) -> None:
        header = self._image.header
        self._count_region("the header", 0, self._cluster_size)
        size = header.refcount_table_clusters * self._cluster_size
        self._count_region("the refcount table", header.refcount_table_offset, size)
        if header.luks_header is not None:
            self._count_region("the LUKS header", *header.luks_header)

    def _count_l1_tables(self) -> L2Tables:
        """Count the L1 tables; returns the L2 tables that they name."""
        header = self._image.header
        tables = L2Tables()
        self._count_region("the L1 table", header.l1_table_offset, header.l1_size * _L1_ENTRY_SIZE)
        l1 = self._image.l1.astype(np.uint64)
        tables.add_active(self._judge_l1("the L1 table", l1))
        self._check_copied_l1(l1)

        snapshots = self._read_snapshots()
        self._count_region("the snapshot table", header.snapshots_offset, snapshots.size)
        room = self._file_end
        for snapshot in snapshots.snapshots:
            what = f"the L1 table of snapshot {snapshot.id!r}"
            size = snapshot.l1_size * _L1_ENTRY_SIZE
            if snapshot.l1_offset % self._cluster_size:
                self._findings.incomplete(f"{what} is not aligned to clusters")
                continue
            room -= size
            if size > MAX_L1_BYTES or room < 0:
                # Tables that together are larger than the file lie over each other, and
                # reading all of them could take forever.
                self._findings.incomplete(f"{what} is too large")
                continue
            self._count_region(what, snapshot.l1_offset, size)
            if snapshot.l1_offset >= self._file_end:
                continue
            data = self._image.readable.read(snapshot.l1_offset, size)
            tables.add(self._judge_l1(what, np.frombuffer(data, ">u8").astype(np.uint64)))
        return tables

    def _read_snapshots(self) -> SnapshotTable:
        header = self._image.header
        try:
            table = read_snapshot_table(self._image)
        except BadSnapshotTable as error:
            self._findings.incomplete(error.sentence)
            return SnapshotTable((), 0)
        if table.snapshots and header.external_data_file:
            message = "internal snapshots in an image with an external data file"
            self._findings.corrupt(1, message)
        if header.version >= 3:
            short = sum(one.extra_size < _MIN_V3_SNAPSHOT_EXTRA for one in table.snapshots)
            self._findings.corrupt(short, counted(short, "incomplete snapshot table entry"))
        return table

    def _count_bitmaps(self) -> None:
        header = self._image.header
        extension = header.bitmaps
        if extension is None:
            return
        if not header.bitmaps_trusted:
            # QEMU does not look at them either, and takes their clusters for leaked.
            self._findings.note(
                "the bitmaps are void, because a program that does not know bitmaps wrote to the "
                "image, or its last writer died; their clusters count as leaked"
            )
            return
        try:
            entries = bitmaps.read_directory(self._image)
        except BadBitmapDirectory as error:
            self._findings.incomplete(error.sentence)
            return
        offset, size = extension.directory_offset, extension.directory_size
        self._count_region("the bitmap directory", offset, size)
        room = self._file_end
        for entry in entries:
            what = f"bitmap {entry.name!r}"
            if entry.unknown:
                message = f"QEMU refuses to open the image because of {what}: {entry.unknown}"
                self._findings.corrupt(1, message)
            size = entry.table_size * bitmaps.TABLE_ENTRY_SIZE
            self._count_region(f"the table of {what}", entry.table_offset, size)
            room -= size
            if entry.table_offset >= self._file_end or room < 0:
                # As above: what is not there, or lies over something else, is not read.
                self._findings.incomplete(f"the table of {what} is not within the file")
                continue
            try:
                table = bitmaps.load_table(self._image, entry)
            except BadBitmapTable as error:
                self._findings.incomplete(error.sentence)
                continue
            stored = table[table > bitmaps.TABLE_ALL_ONES]
            clusters = self._clusters_inside(f"the bits of {what}", stored, 1)
            self._claim(f"the bits of {what}", clusters)
            self._add(clusters, 1)

    def _count_refcount_blocks(self, entries: U64Array) -> I64Array:
        findings = self._findings
        table = entries[entries != 0]
        reserved = table & np.uint64(refcounts.RESERVED) != 0
        unaligned = table & np.uint64(self._cluster_size - 1) != 0
        bad = _count(reserved)
        findings.corrupt(bad, f"{counted(bad, 'refcount table entry')} with reserved bits set")
        bad = _count(unaligned & ~reserved)
        findings.corrupt(bad, f"{counted(bad, 'refcount block')} not aligned to clusters")
        offsets = table[~unaligned]
        clusters = self._clusters_inside("refcount blocks", offsets, 1)
        self._claim("refcount blocks", clusters)
        self._add(clusters, 1)
        return clusters

    # What L2 tables map

    def _judge_l1(self, what: str, l1: U64Array) -> U64Array:
        """The entries of an L1 table that QEMU follows; also one that has flags only."""
        present = l1[l1 != 0]
        bad = _count(present & np.uint64(mapping.L1_RESERVED))
        self._findings.corrupt(bad, f"{counted(bad, 'entry')} of {what} with reserved bits set")
        offset = present & np.uint64(mapping.OFFSET_MASK)
        bad = _count(offset & np.uint64(self._cluster_size - 1))
        self._findings.corrupt(bad, f"{counted(bad, 'L2 table')} of {what} not aligned to clusters")
        self._clusters_inside(f"L2 tables of {what}", offset, 1)
        inside: U64Array = offset[offset < np.uint64(self._file_end)]
        return inside

    def _check_copied_l1(self, l1: U64Array) -> None:
        offset = l1 & np.uint64(mapping.OFFSET_MASK)
        present = offset != 0
        copied = l1[present] & np.uint64(mapping.COPIED) != 0
        wrong = _count(self._stored_is_one(offset[present]) != copied)
        self._record_copied(wrong, "L1")

    def _count_l2_tables(self, tables: L2Tables) -> None:
        for group in tables.groups():
            clusters = self._touched_clusters(group.offsets)
            overlapping = self._marks[clusters] & _EXCLUSIVE != 0
            self._record_overlap("L2 tables", clusters[overlapping])
            self._add(clusters, group.references)
        for group in tables.groups():
            self._marks[self._touched_clusters(group.offsets)] |= _L2_TABLE

    def _count_data(self, group: L2Group) -> None:
        known = self._known.among(group.offsets)
        if known.any():
            self._count_entries(group, *self._known.entries_of(group.offsets[known]))
        self._count_tables(group, group.offsets[~known])

    def _count_tables(self, group: L2Group, tables: U64Array) -> None:
        per_window = max(1, _L2_WINDOW_BYTES // self._cluster_size)
        reader, readable = PieceReader(), self._image.readable
        for at in range(0, len(tables), per_window):
            offsets = tables[at : at + per_window]
            sizes = np.full(len(offsets), self._cluster_size, np.uint64)
            data = reader.read(readable, offsets, sizes)
            words = np.frombuffer(data, ">u8")
            # What is zero is so in any byte order, and the machine's own is the fastest.
            in_use = np.frombuffer(data, np.uint64) != 0
            if not self._image.header.extended_l2:
                self._count_entries(group, _chosen(words, in_use), None)
                continue
            in_use = in_use[0::2] | in_use[1::2]
            entries, subclusters = words[0::2], words[1::2]
            self._count_entries(group, _chosen(entries, in_use), _chosen(subclusters, in_use))

    def _count_entries(
        self, group: L2Group, entries: U64Array, subclusters: U64Array | None
    ) -> None:
        if not len(entries):
            return
        compressed = entries & np.uint64(mapping.COMPRESSED) != 0
        if not compressed.any():
            self._count_plain(group, entries, subclusters)
            return
        plain = ~compressed
        if subclusters is None:
            self._count_plain(group, entries[plain], None)
            self._count_compressed(group, entries[compressed], None)
        else:
            self._count_plain(group, entries[plain], subclusters[plain])
            self._count_compressed(group, entries[compressed], subclusters[compressed])

    def _count_plain(self, group: L2Group, entries: U64Array, subclusters: U64Array | None) -> None:
        external = self._image.header.external_data_file
        self._corrupt_entries(
            group, entries, entries & np.uint64(mapping.L2_RESERVED) != 0, "reserved bits are set"
        )
        allocated = entries & np.uint64(mapping.OFFSET_MASK) != 0
        if external:
            # Offset 0 is a valid place in another file; the COPIED flag tells.
            named = entries & np.uint64(mapping.COPIED) != 0
            if subclusters is None:
                named &= entries & np.uint64(mapping.ZERO_FLAG) == 0
            allocated |= named
        if subclusters is not None:
            both = allocated & (subclusters & subclusters >> np.uint64(32) != 0)
            self._corrupt_entries(group, entries, both, "subclusters are both allocated and zero")
            homeless = ~allocated & (subclusters & np.uint64(mapping.ALL_ALLOCATED) != 0)
            self._corrupt_entries(
                group, entries, homeless, "subclusters are allocated in a cluster that is not"
            )
        entries = entries[allocated]
        if not len(entries):
            return
        offsets = entries & np.uint64(mapping.OFFSET_MASK)
        unaligned = offsets & np.uint64(self._cluster_size - 1) != 0
        self._corrupt_entries(group, entries, unaligned, "not aligned to clusters")
        if group.active:
            copied = entries & np.uint64(mapping.COPIED) != 0
            wrong = ~copied if external else self._stored_is_one(offsets) != copied
            self._record_copied(group.active * _count(wrong), "L2")
        if not external:
            self._clusters_inside("guest data", offsets, group.references)
            inside = offsets[offsets < np.uint64(self._file_end)]
            self._add_data(group, self._touched_clusters(inside))

    def _count_compressed(
        self, group: L2Group, entries: U64Array, subclusters: U64Array | None
    ) -> None:
        copied = entries & np.uint64(mapping.COPIED) != 0
        self._corrupt_entries(group, entries, copied, "COPIED flag on a compressed cluster")
        if self._image.header.external_data_file:
            every = np.ones(len(entries), np.bool_)
            self._corrupt_entries(group, entries, every, "compressed, but data is in another file")
            return
        if subclusters is not None:
            mixed = subclusters != 0
            self._corrupt_entries(group, entries, mixed, "compressed cluster with subclusters")
            entries = entries[~mixed]
        first, last = self._compressed_clusters(group, entries)
        # Compressed data may reach over the end of a cluster, and of more than one if the
        # size is a damaged one; it is two clusters long at most.
        reach = 0
        while len(first):
            self._add_data(group, first + reach)
            reach += 1
            longer = first + reach <= last
            first, last = first[longer], last[longer]

    def _compressed_clusters(self, group: L2Group, entries: U64Array) -> tuple[I64Array, I64Array]:
        """First and last cluster of compressed data, for the entries that lie in the file."""
        # Specification, "Compressed Clusters Descriptor": x = 62 - (cluster_bits - 8).
        offset_bits = 70 - self._bits
        start = (entries & np.uint64((1 << offset_bits) - 1)).astype(np.int64)
        more = (entries & np.uint64(mapping.COMPRESSED - 1)) >> np.uint64(offset_bits)
        end = (start // SECTOR + more.astype(np.int64) + 1) * SECTOR
        outside = end - self._file_end >= self._cluster_size
        self._corrupt_entries(group, entries, outside, "compressed data outside the file")
        inside = ~outside
        return start[inside] >> self._bits, (end[inside] - 1) >> self._bits

    # Counting

    def _count_region(self, what: str, offset: int, size: int) -> None:
        """Count a stretch of the file that nothing else may use."""
        if size <= 0:
            return
        if offset + size - self._file_end >= self._cluster_size:
            self._findings.corrupt(1, f"{what} at offset {offset:#x} is not within the file")
            return
        first, last = offset >> self._bits, (offset + size - 1) >> self._bits
        for start in range(first, last + 1, _CLUSTERS_AT_ONCE):
            clusters = np.arange(start, min(last + 1, start + _CLUSTERS_AT_ONCE))
            self._claim(what, clusters)
            self._add(clusters, 1)

    def _clusters_inside(self, what: str, offsets: U64Array, references: int) -> I64Array:
        """The clusters at *offsets*; those not in the file are corruptions and left out."""
        outside = offsets >= np.uint64(self._file_end)
        bad = _count(outside)
        if bad:
            example = int(offsets[outside][0])
            message = f"{what}: {bad} outside the file, such as at offset {example:#x}"
            self._findings.corrupt(references * bad, message)
            offsets = offsets[~outside]
        return (offsets >> np.uint64(self._bits)).astype(np.int64)

    def _touched_clusters(self, offsets: U64Array) -> I64Array:
        """The clusters that hold one cluster's bytes from each offset: two if not aligned."""
        clusters = (offsets >> np.uint64(self._bits)).astype(np.int64)
        unaligned = offsets & np.uint64(self._cluster_size - 1) != 0
        if unaligned.any():
            return np.concatenate([clusters, clusters[unaligned] + 1])
        return clusters

    def _add_data(self, group: L2Group, clusters: I64Array) -> None:
        overlapping = self._marks[clusters] & (_EXCLUSIVE | _L2_TABLE) != 0
        if overlapping.any():
            self._record_overlap("guest data", clusters[overlapping])
        self._add(clusters, group.references)

    def _add(self, clusters: I64Array, references: int) -> None:
        """Count *references* for each of *clusters*, which may have duplicates."""
        if not len(clusters):
            return
        if (clusters[1:] > clusters[:-1]).all():
            self._raise(clusters, np.full(1, references))
            return
        low, high = int(clusters.min()), int(clusters.max())
        if high - low < 8 * len(clusters):
            times = np.bincount(clusters - low)
            self._raise(slice(low, high + 1), times * references)
            return
        clusters, times = distinct_with_counts(clusters)
        self._raise(clusters, times * references)

    def _raise(self, where: I64Array | slice, by: I64Array) -> None:
        counts = self._counts[where].astype(np.int64) + by
        over = counts - self._limit
        np.minimum(counts, self._limit, out=counts)
        self._counts[where] = counts
        excess = int(over[over > 0].sum())
        message = f"clusters are used more often than refcounts up to {self._limit} can count"
        self._findings.corrupt(excess, message)

    def _claim(self, what: str, clusters: I64Array) -> None:
        """Mark clusters as such that nothing else may use."""
        ordered = np.sort(clusters)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        taken = ordered[self._marks[ordered] & _EXCLUSIVE != 0]
        self._record_overlap(what, np.concatenate([twice, taken]))
        self._marks[ordered] |= _EXCLUSIVE

    def _stored_is_one(self, offsets: U64Array) -> BoolArray:
        """Whether the stored refcount is 1; taken for 0 behind the end of the file."""
        clusters = np.minimum(offsets >> np.uint64(self._bits), np.uint64(self._clusters))
        is_one: BoolArray = self._marks[clusters.astype(np.int64)] & _STORED_IS_ONE != 0
        return is_one

    # Findings

    def _corrupt_entries(
        self, group: L2Group, entries: U64Array, bad: BoolArray, problem: str
    ) -> None:
        count = _count(bad)
        if count:
            example = int(entries[bad][0])
            message = f"{counted(count, 'L2 entry')}, such as {example:#018x}: {problem}"
            self._findings.corrupt(group.references * count, message)

    def _record_copied(self, count: int, table: str) -> None:
        self._findings.copied_mismatches += count
        message = f"{counted(count, f'{table} entry')}: {_COPIED_PROBLEM}"
        self._findings.corrupt(count, message)

    def _record_overlap(self, what: str, clusters: I64Array) -> None:
        if len(clusters):
            example = int(clusters[0]) << self._bits
            message = f"{what}: {len(clusters)} in clusters of metadata, such as at {example:#x}"
            self._findings.overlap(len(clusters), message)


def _chosen(words: U64Array, in_use: BoolArray) -> U64Array:
    """The words in this machine's byte order, without those not in use where they are many."""
    if np.count_nonzero(in_use) < len(in_use) // mapping.SPARSE:
        words = words[in_use]
    return words.astype(np.uint64)


def _count(condition: npt.NDArray[Any]) -> int:
    return int(np.count_nonzero(condition))
