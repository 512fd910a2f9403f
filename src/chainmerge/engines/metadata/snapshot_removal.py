# SPDX-License-Identifier: Apache-2.0
"""Removing internal snapshots from a closed image, in one switch.

A snapshot shares clusters with the guest's disk. With the snapshot gone such a cluster is used
once, and then its refcount and the COPIED flag of the entry that names it have to change at the
same instant. So the refcounts are rewritten, and so are the L1 and L2 tables in which a flag
changes: all of it into free clusters that nothing counts, before one sector names it. A kill
leaves the old image, or the new one with nothing left to do in it, and leaks in neither.
"""

from __future__ import annotations

import contextlib
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from chainmerge.arithmetic.arrays import BoolArray, U8Array, U32Array, U64Array
from chainmerge.arithmetic.distinct import distinct, distinct_with_counts
from chainmerge.arithmetic.rounding import divide_up
from chainmerge.chain.errors import ImageDamaged
from chainmerge.engines.metadata.allocation import (
    Allocation,
    Demand,
    FreeSpace,
    allocate_with_all_blocks,
    stored_free_space,
)
from chainmerge.engines.metadata.counting import new_refcount_table, table_with_new_blocks
from chainmerge.engines.metadata.errors import NotEnoughSpace, RewriteFailed
from chainmerge.engines.metadata.header import HeaderWrite, compose_header, content_of
from chainmerge.engines.metadata.old_tree import refcount_table_clusters
from chainmerge.engines.metadata.preconditions import require_clean_bits, require_sound_report
from chainmerge.engines.metadata.refcount_blocks import Write, pack_refcounts
from chainmerge.engines.metadata.replacement import ranges_of
from chainmerge.engines.metadata.steps import Port, Step, StepName, reserve, write_steps
from chainmerge.engines.metadata.writes import Piece, gathered, whole_clusters
from chainmerge.errors import ChainmergeError
from chainmerge.qcow2.check import check
from chainmerge.qcow2.gather import read_pieces
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.mapping import COMPRESSED, COPIED, OFFSET_MASK, compressed_place
from chainmerge.qcow2.refcounts import read_refcount_table, read_refcounts, refcounts_per_block
from chainmerge.qcow2.runs import NO_CLUSTERS, Clusters, runs_of, runs_within
from chainmerge.qcow2.snapshots import read_snapshot_table

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from chainmerge.qcow2.header import Header
    from chainmerge.qcow2.snapshots import Snapshot

_ENTRY_BYTES: Final = 8
_TABLE_BYTES_AT_ONCE: Final = 4 << 20
_CLUSTERS_AT_ONCE: Final = 1 << 20


class SnapshotRemoval(Struct, frozen=True, dict=True):
    """A removal of snapshots that is decided down to the cluster.

    Attributes:
        image: The image as it is.
        snapshot_table: The entries of the snapshots that stay, as they are stored.
        staying: How many these are.
        tables: File offsets of the active L2 tables that are rewritten, ascending.
        renews_l1: Whether the active L1 table is.
        given_up: How often each cluster of the file is used by what goes.
        allocation: Where everything new lies.
    """

    image: Qcow2Image
    snapshot_table: bytes
    staying: int
    tables: U64Array
    renews_l1: bool
    given_up: U32Array
    allocation: Allocation

    @property
    def required_size(self) -> int:
        """Bytes that the file must have for the new clusters."""
        return self.allocation.end * self.image.header.cluster_size

    @cached_property
    def freed(self) -> Clusters:
        """Clusters that nothing uses any more afterwards, ascending."""
        found = [NO_CLUSTERS]
        for first in range(0, len(self.given_up), _CLUSTERS_AT_ONCE):
            count = min(_CLUSTERS_AT_ONCE, len(self.given_up) - first)
            stored = read_refcounts(self.image, first, count)
            left = self.remaining(first, count)
            found.append(np.flatnonzero((stored != 0) & (left == 0)) + first)
        return np.concatenate(found)

    def remaining(self, first: int, count: int) -> U64Array:
        """The refcounts of clusters *first* to *first + count*, without what is new."""
        stored = read_refcounts(self.image, first, count)
        gone = self.given_up[first : first + count]
        # A refcount that would fall below 0 stays: better leaked than given away.
        known = stored[: len(gone)]
        stored[: len(gone)] = known - np.where(gone <= known, gone, 0).astype(np.uint64)
        return stored

    def space_after(self) -> FreeSpace:
        """What is free in the image once the snapshots are gone."""
        header, allocation = self.image.header, self.allocation
        entries = refcounts_per_block(header)
        table = table_with_new_blocks(header, np.zeros(0, np.uint64), allocation)

        def uses(first: int, count: int) -> U64Array:
            left = self.remaining(first, count)
            left[runs_within(allocation.everything, first, first + count).expanded() - first] = 1
            return left

        return FreeSpace(
            self.image.name,
            replace(header, refcount_table_clusters=allocation.table_clusters),
            table,
            (int(allocation.blocks.index[-1]) + 1) * entries,
            uses,
        )


def plan_snapshot_removal(image: Qcow2Image, removed: Collection[int]) -> SnapshotRemoval:
    """Decide how to take the snapshots at the positions *removed* out of the image's table.

    Reads tables and refcounts, writes nothing.

    Raises:
        ImageDirty, ImageCorrupt, ImageDamaged: the image must be repaired first.
        BadSnapshotTable, FormatError: its tables cannot be read.
        RefcountTableFull: the clusters that it takes cannot be counted.
        HeaderFull: one sector write cannot switch to it.
    """
    # Bitmaps stay where they are, so they must be sound too.
    require_clean_bits(image)
    require_sound_report(check(image))
    header = image.header
    if header.external_data_file:
        raise ImageDamaged(image.name, 1, "internal snapshots beside an external data file")
    listed = read_snapshot_table(image)
    going = [one for at, one in enumerate(listed.snapshots) if at in removed]
    staying = [one for at, one in enumerate(listed.snapshots) if at not in removed]
    snapshot_table = _table_of(image, staying)

    known = divide_up(image.readable.size, header.cluster_size)
    given_up = np.zeros(known + 1, np.uint32)
    _give_up(given_up, _span(header.snapshots_offset, listed.size, header))
    for snapshot in going:
        _give_up_snapshot(given_up, image, snapshot)

    blocks = read_refcount_table(image)
    counts = _Counts(image, given_up)
    tables = _tables_to_renew(image, counts)
    renews_l1 = bool(len(tables)) or _l1_needs_flags(image, counts)
    _give_up(given_up, (tables >> np.uint64(header.cluster_bits)).astype(np.int64))
    if renews_l1:
        _give_up(given_up, _span(header.l1_table_offset, header.l1_size * _ENTRY_BYTES, header))
    _give_up(given_up, refcount_table_clusters(image))
    present = blocks[blocks != 0]
    _give_up(given_up, (present >> np.uint64(header.cluster_bits)).astype(np.int64))

    pieces = _pieces(header, snapshot_table, header.l1_size if renews_l1 else 0)
    demand = Demand(
        scattered=len(tables) + pieces.count(1),
        contiguous=tuple(piece for piece in pieces if piece > 1),
    )
    allocation = allocate_with_all_blocks(
        stored_free_space(image), demand, np.flatnonzero(blocks).astype(np.int64)
    )
    removal = SnapshotRemoval(
        image, snapshot_table, len(staying), tables, renews_l1, given_up, allocation
    )
    # Whether one sector can switch to it has to come out now.
    _head(removal)
    return removal


def remove_snapshots(port: Port, removed: Collection[int]) -> int:
    """Take the snapshots at the positions *removed* out of a closed image's table.

    At any instant the image has all of them or none. Returns how many bytes were freed.

    Raises what :func:`plan_snapshot_removal` raises, and:

    Raises:
        NotEnoughSpace: there is no room for the new tables.
        RewriteFailed: nothing changed.
        SwitchUnknown: the image has all of the snapshots, or none.
    """
    removal = plan_snapshot_removal(Qcow2Image(port), removed)
    image, allocation = removal.image, removal.allocation
    cluster_size, old_size = image.header.cluster_size, port.size
    head = _head(removal)
    freed = runs_of(removal.freed)

    def fill() -> Iterator[Write]:
        yield from gathered(_new_clusters(removal), cluster_size)
        yield from head.beyond

    steps = [Step(StepName.FILL, fill), Step(StepName.SWITCH, lambda: [(0, head.sector)])]
    try:
        reserve(port, removal.required_size, ranges_of(allocation.everything, cluster_size))
        write_steps(port, steps)
    except (NotEnoughSpace, RewriteFailed):
        # Nothing leads to what is new. What the file has grown by is given back.
        if not port.is_block_device:
            with contextlib.suppress(ChainmergeError):
                port.truncate_to(old_size)
        raise
    if not port.is_block_device:
        # The snapshots are gone; space that cannot be given back is only that.
        with contextlib.suppress(ChainmergeError):
            for offset, length in ranges_of(freed, cluster_size):
                port.punch(offset, length)
    return freed.total * cluster_size


# What goes


def _table_of(image: Qcow2Image, snapshots: Sequence[Snapshot]) -> bytes:
    """Entries as they are stored; each starts at a multiple of 8 bytes, the last is not padded."""
    table = bytearray()
    for snapshot in snapshots:
        table += bytes(-len(table) % 8)
        at = image.header.snapshots_offset + snapshot.entry_offset
        table += image.readable.read(at, snapshot.entry_size)
    return bytes(table)


def _give_up_snapshot(given_up: U32Array, image: Qcow2Image, snapshot: Snapshot) -> None:
    header = image.header
    size = snapshot.l1_size * _ENTRY_BYTES
    _give_up(given_up, _span(snapshot.l1_offset, size, header))
    l1 = np.frombuffer(image.readable.read(snapshot.l1_offset, size), ">u8").astype(np.uint64)
    tables = l1 & np.uint64(OFFSET_MASK)
    tables = tables[tables != 0]
    _give_up(given_up, (tables >> np.uint64(header.cluster_bits)).astype(np.int64))
    for _, words in _l2_tables(image, tables):
        entries = words[:, ::2] if header.extended_l2 else words
        _give_up(given_up, _data_clusters(header, entries.ravel()))


def _data_clusters(header: Header, entries: U64Array) -> Clusters:
    """The host clusters that L2 entries name, once for each reference."""
    packed = entries & np.uint64(COMPRESSED) != 0
    plain = entries[~packed] & np.uint64(OFFSET_MASK)
    parts = [(plain[plain != 0] >> np.uint64(header.cluster_bits)).astype(np.int64)]
    if packed.any():
        host, size = compressed_place(header, entries[packed])
        first = (host >> np.uint64(header.cluster_bits)).astype(np.int64)
        last = ((host + size - np.uint64(1)) >> np.uint64(header.cluster_bits)).astype(np.int64)
        # Compressed data is no longer than a cluster and a sector, so it lies in two at most.
        parts += [first, last[last > first]]
    return np.concatenate(parts)


def _give_up(given_up: U32Array, clusters: Clusters) -> None:
    inside, times = distinct_with_counts(clusters[clusters < len(given_up)])
    given_up[inside] += times.astype(np.uint32)


def _span(offset: int, length: int, header: Header) -> Clusters:
    first = offset // header.cluster_size
    return np.arange(first, divide_up(offset + length, header.cluster_size), dtype=np.int64)


# Which flags change


class _Counts:
    """Which clusters are used once, when the snapshots are gone."""

    def __init__(self, image: Qcow2Image, given_up: U32Array) -> None:
        known = len(given_up)
        self.single = np.zeros(known, np.bool_)
        for first in range(0, known, _CLUSTERS_AT_ONCE):
            count = min(_CLUSTERS_AT_ONCE, known - first)
            left = read_refcounts(image, first, count)
            gone = given_up[first : first + count]
            self.single[first : first + count] = (left - gone == 1) & (gone <= left)

    def need_flag(self, header: Header, entries: U64Array) -> BoolArray:
        """Which plain entries name a cluster that is theirs alone and do not say so."""
        hosts = (entries & np.uint64(OFFSET_MASK)) >> np.uint64(header.cluster_bits)
        within = (hosts != 0) & (hosts < np.uint64(len(self.single)))
        alone = self.single[np.where(within, hosts, np.uint64(0)).astype(np.int64)]
        flags = entries & np.uint64(COPIED | COMPRESSED) != 0
        needed: BoolArray = within & alone & ~flags
        return needed


def _tables_to_renew(image: Qcow2Image, counts: _Counts) -> U64Array:
    """Offsets of the active L2 tables with an entry that needs a flag, ascending."""
    header = image.header
    tables = _active_tables(image)
    found = [np.zeros(0, np.uint64)]
    for offsets, words in _l2_tables(image, tables):
        entries = words[:, ::2] if header.extended_l2 else words
        needed = counts.need_flag(header, entries.ravel()).reshape(entries.shape).any(axis=1)
        found.append(offsets[needed])
    return np.concatenate(found)


def _l1_needs_flags(image: Qcow2Image, counts: _Counts) -> bool:
    return bool(counts.need_flag(image.header, image.l1.astype(np.uint64)).any())


def _active_tables(image: Qcow2Image) -> U64Array:
    offsets = distinct(image.l1.astype(np.uint64) & np.uint64(OFFSET_MASK))
    tables: U64Array = offsets[offsets != 0]
    return tables


def _l2_tables(image: Qcow2Image, tables: U64Array) -> Iterator[tuple[U64Array, U64Array]]:
    """L2 tables in portions: their offsets, and their words ``uint64[tables, words]``."""
    size = image.header.cluster_size
    at_once = max(1, _TABLE_BYTES_AT_ONCE // size)
    for start in range(0, len(tables), at_once):
        part = tables[start : start + at_once]
        data = read_pieces(image.readable, part, size)
        yield part, np.frombuffer(data, ">u8").astype(np.uint64).reshape(len(part), -1)


# What is new


def _pieces(header: Header, snapshot_table: bytes, l1_entries: int) -> list[int]:
    """Clusters of the new snapshot table and of the new L1 table, those that are needed."""
    lengths = (len(snapshot_table), l1_entries * _ENTRY_BYTES)
    return [divide_up(length, header.cluster_size) for length in lengths if length]


class _Places(Struct, frozen=True):
    """Clusters of what is new: 0 if there is none of it."""

    snapshot_table: int
    l1: int
    tables: Clusters


def _places(removal: SnapshotRemoval) -> _Places:
    header, allocation = removal.image.header, removal.allocation
    single = iter(allocation.scattered.expanded().tolist())
    longer = iter(allocation.contiguous.tolist())
    lengths = iter(
        _pieces(header, removal.snapshot_table, header.l1_size if removal.renews_l1 else 0)
    )

    def next_place() -> int:
        places = single if next(lengths) == 1 else longer
        return int(next(places))

    snapshot_table = next_place() if removal.snapshot_table else 0
    l1 = next_place() if removal.renews_l1 else 0
    return _Places(snapshot_table, l1, np.fromiter(single, np.int64))


def _head(removal: SnapshotRemoval) -> HeaderWrite:
    header, allocation, places = removal.image.header, removal.allocation, _places(removal)
    assert allocation.table_start is not None
    content = replace(
        content_of(header),
        snapshot_count=removal.staying,
        snapshots_offset=places.snapshot_table * header.cluster_size,
        refcount_table_offset=allocation.table_start * header.cluster_size,
        refcount_table_clusters=allocation.table_clusters,
    )
    if removal.renews_l1:
        content = replace(content, l1_table_offset=places.l1 * header.cluster_size)
    cluster = removal.image.readable.read(0, header.cluster_size)
    return compose_header(removal.image.name, cluster, header, content)


def _new_clusters(removal: SnapshotRemoval) -> Iterator[Piece]:
    image, allocation, places = removal.image, removal.allocation, _places(removal)
    header = image.header
    counts = _Counts(image, _without_tables(removal))
    if removal.snapshot_table:
        yield _run(
            places.snapshot_table, whole_clusters(removal.snapshot_table, header.cluster_size)
        )
    if removal.renews_l1:
        l1 = _new_l1(removal, counts, places).astype(">u8").tobytes()
        yield _run(places.l1, whole_clusters(l1, header.cluster_size))
    done = 0
    for _, words in _l2_tables(image, removal.tables):
        entries = words[:, ::2] if header.extended_l2 else words
        needed = counts.need_flag(header, entries.ravel()).reshape(entries.shape)
        entries |= np.where(needed, np.uint64(COPIED), np.uint64(0))
        rows = words.astype(">u8").view(np.uint8).reshape(len(words), header.cluster_size)
        yield places.tables[done : done + len(words)], rows
        done += len(words)
    per_block = refcounts_per_block(header)
    for index, cluster in zip(
        allocation.blocks.index.tolist(), allocation.blocks.cluster.tolist(), strict=True
    ):
        first = index * per_block
        refcounts = removal.remaining(first, per_block)
        new = runs_within(allocation.everything, first, first + per_block).expanded()
        refcounts[new - first] = 1
        data = pack_refcounts(refcounts, header.refcount_order)
        yield np.array([cluster]), whole_clusters(data, header.cluster_size)
    yield new_refcount_table(header, np.zeros(0, np.uint64), allocation)


def _without_tables(removal: SnapshotRemoval) -> U32Array:
    """What the snapshots alone give up, of the active tables' clusters."""
    given_up = removal.given_up.copy()
    bits = np.uint64(removal.image.header.cluster_bits)
    given_up[(removal.tables >> bits).astype(np.int64)] -= 1
    return given_up


def _new_l1(removal: SnapshotRemoval, counts: _Counts, places: _Places) -> U64Array:
    header = removal.image.header
    l1: U64Array = removal.image.l1.astype(np.uint64)
    l1[counts.need_flag(header, l1)] |= np.uint64(COPIED)
    offsets = l1 & np.uint64(OFFSET_MASK)
    at = np.searchsorted(removal.tables, offsets)
    at[at == len(removal.tables)] = 0
    if len(removal.tables):
        renewed = removal.tables[at] == offsets
        new = places.tables[at[renewed]].astype(np.uint64) << np.uint64(header.cluster_bits)
        l1[renewed] = new | np.uint64(COPIED)
    return l1


def _run(first: int, rows: U8Array) -> Piece:
    return np.arange(first, first + len(rows), dtype=np.int64), rows
