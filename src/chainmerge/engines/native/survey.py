# SPDX-License-Identifier: Apache-2.0
"""What a merge takes and gives back in base, counted from the tables alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from chainmerge.arithmetic.distinct import distinct
from chainmerge.arithmetic.rounding import divide_up, round_up
from chainmerge.engines.metadata.allocation import Allocation, Demand, FreeSpace, allocate
from chainmerge.engines.metadata.bitmap_set import BitmapSetLayout, lay_out
from chainmerge.engines.metadata.old_tree import bitmap_clusters, refcount_table_clusters
from chainmerge.engines.metadata.replacement import names_kept
from chainmerge.engines.native.decisions import (
    Change,
    MappedDisk,
    find_wanted,
    old_hosts,
    place_data,
)
from chainmerge.engines.native.moves import segments_of
from chainmerge.engines.native.windows import (
    changed_windows,
    l2_entries_of,
    read_old_entries,
    table_offsets,
    tables_in,
)
from chainmerge.options import Placement
from chainmerge.qcow2.extents import Kind
from chainmerge.qcow2.header import L1_ENTRY_BYTES
from chainmerge.qcow2.mapping import COMPRESSED, COPIED, OFFSET_MASK, compressed_place
from chainmerge.qcow2.runs import Clusters, Runs, joined_runs, runs_of, split_runs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from chainmerge.arithmetic.arrays import U64Array
    from chainmerge.chain.view import GuestView, Resolved
    from chainmerge.engines.metadata.bitmap_set import AnyBitmap
    from chainmerge.qcow2.header import Header
    from chainmerge.qcow2.image import Qcow2Image


class MappingNeed(Struct, frozen=True, eq=False):
    """What the new mapping takes; clusters unless said otherwise.

    Attributes:
        data: New data clusters.
        tables: L2 tables that are rewritten.
        written: Bytes of guest data to be written.
        given_up: Data clusters and L2 tables that only the old mapping uses.
        released: These clusters, once for each reference that the old mapping has to them.
        unpacked: New data clusters whose data is compressed where it is now.
        in_place: Start and end, in the file, of what is written to clusters that stay; each an
            int64 array for some of them.
    """

    data: int = 0
    tables: int = 0
    written: int = 0
    given_up: int = 0
    released: tuple[Runs, ...] = ()
    unpacked: int = 0
    in_place: tuple[tuple[Clusters, Clusters], ...] = ()

    def plus(self, other: MappingNeed) -> MappingNeed:
        """Both together."""
        return MappingNeed(
            self.data + other.data,
            self.tables + other.tables,
            self.written + other.written,
            self.given_up + other.given_up,
            self.released + other.released,
            self.unpacked + other.unpacked,
            self.in_place + other.in_place,
        )


def survey_mapping(
    image: Qcow2Image, disk: MappedDisk, above: GuestView
) -> dict[Placement, MappingNeed]:
    """Count what each way of placing data takes. Reads tables only.

    Args:
        image: Base.
        disk: Base too.
        above: The images above it that are merged.
    """
    needs = dict.fromkeys(Placement, MappingNeed())
    for window in changed_windows(above, disk):
        for placement, need in _needs_of(image, disk, window).items():
            needs[placement] = needs[placement].plus(need)
    return needs


def _needs_of(
    image: Qcow2Image, disk: MappedDisk, window: Resolved
) -> dict[Placement, MappingNeed]:
    tables = tables_in(disk, window)
    if not table_offsets(image, tables).any() and _is_all_data(window):
        return dict.fromkeys(Placement, need_of_data(disk.header, window))
    wanted = find_wanted(disk, read_old_entries(image, window), window)
    # Where nothing is replaced there is nothing to choose.
    ways = tuple(Placement) if wanted.entry.any() else (Placement.COW,)
    needs = {way: _need_of(image, disk, place_data(wanted, disk, way), window) for way in ways}
    return {way: needs.get(way, needs[Placement.COW]) for way in Placement}


def _is_all_data(window: Resolved) -> bool:
    return bool(((window.kind == Kind.DATA) | (window.kind == Kind.COMPRESSED)).all())


def need_of_data(header: Header, window: Resolved) -> MappingNeed:
    """What a window takes that is nothing but data above and has no L2 table in base.

    As :func:`~chainmerge.engines.native.decisions.find_wanted` finds it out cluster by cluster.
    """
    length = window.end - window.start
    clusters = divide_up(length, header.cluster_size)
    return MappingNeed(
        data=clusters,
        tables=divide_up(clusters, header.l2_entries),
        written=round_up(length, header.subcluster_size),
        unpacked=_clusters_of(header, window.length[window.kind == Kind.COMPRESSED]),
    )


def _clusters_of(header: Header, lengths: U64Array) -> int:
    """Clusters that runs of so many bytes reach into at most."""
    return int(divide_up(lengths.astype(np.int64), header.cluster_size).sum())


def l2_tables_of(change: Change, l2_entries: int) -> Clusters:
    """L1 indexes of the tables in which entries change, ascending."""
    return distinct(change.cluster[change.remapped] // l2_entries)


def _need_of(image: Qcow2Image, disk: MappedDisk, change: Change, window: Resolved) -> MappingNeed:
    header = disk.header
    fresh = change.cluster[change.fresh].astype(np.uint64) * np.uint64(header.cluster_size)
    run = np.searchsorted(window.guest, fresh, "right") - 1
    tables = l2_tables_of(change, header.l2_entries)
    units = int(np.count_nonzero(np.unpackbits(change.copied.view(np.uint8))))
    replaced = np.count_nonzero(table_offsets(image, tables))
    return MappingNeed(
        data=int(np.count_nonzero(change.fresh)),
        tables=len(tables),
        written=units * header.subcluster_size,
        given_up=int(np.count_nonzero(change.released) + replaced),
        released=tuple(given_up(image, header, change, tables)),
        unpacked=int(np.count_nonzero(window.kind[run] == Kind.COMPRESSED)),
        in_place=tuple(_in_place(header, change)),
    )


def released_clusters(
    image: Qcow2Image, tree: NewTree, placed: PlacedTree, mapping: Iterable[Runs]
) -> Runs:
    """What only the old tree uses, once for each reference, in any order.

    Args:
        image: The image with its old tree.
        tree: The new one.
        placed: Where that is.
        mapping: What the old mapping gives up: :attr:`MappingNeed.released`.
    """
    old = image.header
    released = list(mapping)
    if placed.l1_start is not None:
        length = old.l1_size * L1_ENTRY_BYTES
        released.append(_span(old.l1_table_offset, length, old.cluster_size))
    if tree.bitmaps is not None:
        released.append(runs_of(bitmap_clusters(image, names_kept(tree.bitmaps.bitmaps))))
    if placed.allocation.table_start is not None:
        released.append(runs_of(refcount_table_clusters(image)))
    nothing = np.zeros(0, dtype=np.int64)
    return Runs(
        np.concatenate([runs.start for runs in released] or [nothing]),
        np.concatenate([runs.length for runs in released] or [nothing]),
    )


def _span(offset: int, length: int, cluster_size: int) -> Runs:
    first, end = offset // cluster_size, divide_up(offset + length, cluster_size)
    return Runs(np.array([first], dtype=np.int64), np.array([end - first], dtype=np.int64))


def given_up(
    image: Qcow2Image, header: Header, change: Change, indexes: Clusters
) -> Iterator[Runs]:
    """Host clusters that the old mapping of these guest clusters used, once for each reference.

    Args:
        image: The image that is written.
        header: Its header.
        change: What changes.
        indexes: L1 indexes of the tables in which that changes entries.
    """
    tables = l2_entries_of(image, indexes)
    entry = change.entry[change.released]
    packed = entry & np.uint64(COMPRESSED) != 0
    named = np.concatenate([tables, entry[~packed]])
    if not header.snapshot_count:
        # What is shared although there is no snapshot has another entry in these tables, which
        # would need a COPIED flag at the instant at which its refcount falls to 1.
        named = named[named & np.uint64(COPIED) != 0]
    plain = named & np.uint64(OFFSET_MASK)
    plain = plain[plain != 0]
    yield runs_of(np.sort((plain >> np.uint64(header.cluster_bits)).astype(np.int64)))
    if packed.any():
        host, size = compressed_place(header, entry[packed])
        first = (host >> np.uint64(header.cluster_bits)).astype(np.int64)
        last = ((host + size - np.uint64(1)) >> np.uint64(header.cluster_bits)).astype(np.int64)
        yield Runs(first, last - first + 1)


def _in_place(header: Header, change: Change) -> Iterator[tuple[Clusters, Clusters]]:
    if not (change.reused & (change.copied != 0)).any():
        return
    written = segments_of(change, change.reused, old_hosts(change), header)
    start = written.target.astype(np.int64)
    yield start, start + written.length.astype(np.int64)


class NewTree(Struct, frozen=True):
    """All clusters that base gets, before it is decided where.

    Attributes:
        disk: Base.
        mapping: What the guest's data takes.
        bitmaps: The new set of bitmaps; None if the present one stays.
        l1_entries: Length of the new L1 table; 0 where the present one stays.
    """

    disk: MappedDisk
    mapping: MappingNeed
    bitmaps: BitmapSetLayout | None
    l1_entries: int

    @property
    def l1_clusters(self) -> int:
        """Length of the new L1 table."""
        return divide_up(self.l1_entries * L1_ENTRY_BYTES, self.disk.header.cluster_size)

    @property
    def changes_nothing(self) -> bool:
        """Whether no byte of metadata has to change."""
        same_size = self.disk.size_after == self.disk.header.virtual_size
        return self.bitmaps is None and not self.l1_entries and same_size

    @property
    def demand(self) -> Demand:
        """How many clusters this takes, and which of them in one piece."""
        bitmaps = self.bitmaps.demand if self.bitmaps is not None else Demand(0, ())
        single = self.l1_clusters == 1
        pieces = (self.l1_clusters,) if self.l1_clusters > 1 else ()
        return Demand(
            scattered=bitmaps.scattered + self.mapping.tables + single + self.mapping.data,
            contiguous=bitmaps.contiguous + pieces,
        )


class PlacedTree(Struct, frozen=True):
    """Where everything goes.

    Attributes:
        allocation: All of it, and what counts it.
        bitmaps: The part for the bitmaps.
        l1_start: First cluster of the new L1 table; None if the present one stays.
        pieces: First cluster and length of everything that lies in one piece.
        tables: For L2 tables.
        data: For guest data.
    """

    allocation: Allocation
    bitmaps: Allocation
    l1_start: int | None
    pieces: tuple[tuple[int, int], ...]
    tables: Runs
    data: Runs

    @property
    def metadata(self) -> Runs:
        """All but the clusters for guest data."""
        blocks = runs_of(np.sort(self.allocation.blocks.cluster))
        pieces = [Runs(np.array([start]), np.array([length])) for start, length in self.pieces]
        return joined_runs([self.tables, self.bitmaps.scattered, blocks, *pieces])


def new_tree(
    name: str,
    disk: MappedDisk,
    mapping: MappingNeed,
    bitmaps: Sequence[AnyBitmap] | None,
) -> NewTree:
    """What base gets.

    Args:
        name: What messages call base.
        disk: Base.
        mapping: What the guest's data takes.
        bitmaps: The set that base shall have, of the disk's new size; None to keep it.

    Raises:
        BitmapSetUnfit: base cannot hold these bitmaps.
    """
    header = disk.header
    wanted = max(header.l1_size, divide_up(disk.clusters_after, header.l2_entries))
    renewed = mapping.tables > 0 or wanted > header.l1_size
    resized = replace(header, virtual_size=disk.size_after)
    layout = lay_out(name, resized, bitmaps) if bitmaps is not None else None
    return NewTree(disk, mapping, layout, wanted if renewed else 0)


def place_tree(tree: NewTree, space: FreeSpace) -> PlacedTree:
    """Find clusters for all of it.

    Raises:
        RefcountTableFull: they could not be counted.
    """
    allocation = allocate(space, tree.demand)
    bitmaps = tree.bitmaps.demand if tree.bitmaps is not None else Demand(0, ())
    tables, rest = split_runs(allocation.scattered, tree.mapping.tables)
    for_bitmaps, rest = split_runs(rest, bitmaps.scattered)
    pieces = len(bitmaps.contiguous)
    l1_start = None
    if tree.l1_clusters > 1:
        l1_start = int(allocation.contiguous[pieces])
    elif tree.l1_clusters == 1:
        l1, rest = split_runs(rest, 1)
        l1_start = int(l1.start[0])
    return PlacedTree(
        allocation=allocation,
        bitmaps=replace(
            allocation, scattered=for_bitmaps, contiguous=allocation.contiguous[:pieces]
        ),
        l1_start=l1_start,
        pieces=tuple(_pieces(tree, allocation, l1_start)),
        tables=tables,
        data=rest,
    )


def _pieces(
    tree: NewTree, allocation: Allocation, l1_start: int | None
) -> Iterator[tuple[int, int]]:
    yield from zip(allocation.contiguous.tolist(), tree.demand.contiguous, strict=True)
    if l1_start is not None and tree.l1_clusters == 1:
        yield l1_start, 1
    if allocation.table_start is not None:
        yield allocation.table_start, allocation.table_clusters
