# SPDX-License-Identifier: Apache-2.0
"""Counting what is allocated and what is released: the writes that this takes.

By the steps of :mod:`chainmerge.engines.metadata.steps`: new refcount blocks and a new
refcount table are of FILL, raised refcounts of COUNT, links of LINK and lowered refcounts
of RELEASE.

All go from refcount block to refcount block and expand no more than the range of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chainmerge.engines.metadata.allocation import Allocation, blocks_touched, slices_by
from chainmerge.engines.metadata.refcount_blocks import Write, pack_refcounts, refcount_writes
from chainmerge.engines.metadata.writes import Piece, whole_clusters
from chainmerge.qcow2.header import SECTOR, Header
from chainmerge.qcow2.refcounts import refcounts_per_block, unpack_refcounts
from chainmerge.qcow2.runs import Clusters, Runs, runs_within

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.arithmetic.arrays import U64Array
    from chainmerge.qcow2.readable import Readable

_TABLE_ENTRY_BYTES = 8


def new_refcount_blocks(header: Header, allocation: Allocation) -> Iterator[Piece]:
    """The new refcount blocks, each counting the new clusters in its range."""
    entries = refcounts_per_block(header)
    blocks = allocation.blocks
    for index, cluster in zip(blocks.index.tolist(), blocks.cluster.tolist(), strict=True):
        refcounts = np.zeros(entries, dtype=np.uint64)
        refcounts[_within_block(allocation.everything, index, entries)] = 1
        data = pack_refcounts(refcounts, header.refcount_order)
        yield np.array([cluster]), whole_clusters(data, header.cluster_size)


def table_with_new_blocks(header: Header, table: U64Array, allocation: Allocation) -> U64Array:
    """The refcount table's entries once the new blocks are in it: file offsets of blocks.

    As long as *table*, or as the table that replaces it.
    """
    size = allocation.table_clusters * header.cluster_size // _TABLE_ENTRY_BYTES
    entries = np.zeros(max(size, len(table)), dtype=np.uint64)
    entries[: len(table)] = table
    entries[allocation.blocks.index] = allocation.blocks.cluster * header.cluster_size
    return entries


def new_refcount_table(header: Header, table: U64Array, allocation: Allocation) -> Piece:
    """The refcount table that replaces the old one: the same blocks and the new ones.

    Args:
        header: The image's header.
        table: The old table's entries.
        allocation: One with a new table.
    """
    start = allocation.table_start
    assert start is not None, "the old refcount table is to stay"
    entries = table_with_new_blocks(header, table, allocation)
    clusters = np.arange(start, start + allocation.table_clusters, dtype=np.int64)
    return clusters, whole_clusters(entries.astype(">u8").tobytes(), header.cluster_size)


def blocks_raised(header: Header, allocation: Allocation) -> Clusters:
    """Indexes of the refcount blocks that there are already and that count new clusters."""
    touched = blocks_touched(allocation.everything, header)
    return np.setdiff1d(touched, allocation.blocks.index, assume_unique=True)


def raised_refcounts(
    readable: Readable, header: Header, table: U64Array, allocation: Allocation
) -> Iterator[Write]:
    """Writes that set to 1 the refcounts of new clusters in the blocks there are already.

    Args:
        readable: Where the blocks are read from, each when its write is asked for.
        header: The image's header.
        table: The entries of the refcount table, with the blocks that there are.
        allocation: The new clusters.
    """
    entries = refcounts_per_block(header)
    for index in blocks_raised(header, allocation).tolist():
        clusters = index * entries + _within_block(allocation.everything, index, entries)
        ones = np.ones(len(clusters), dtype=np.uint64)
        yield from refcount_writes(readable, header, table, clusters, ones)


def link_writes(readable: Readable, header: Header, allocation: Allocation) -> Iterator[Write]:
    """Writes that enter new blocks into the refcount table there is, sector by sector.

    None with a new table, which has them from the beginning.
    """
    if allocation.table_start is not None:
        return
    per_sector = SECTOR // _TABLE_ENTRY_BYTES
    blocks = allocation.blocks
    for part in slices_by(blocks.index, per_sector):
        sector = int(blocks.index[part.start]) // per_sector
        offset = header.refcount_table_offset + sector * SECTOR
        entries = np.frombuffer(readable.read(offset, SECTOR), dtype=">u8").copy()
        entries[blocks.index[part] % per_sector] = blocks.cluster[part] * header.cluster_size
        yield offset, entries.tobytes()


def lowered_refcounts(
    readable: Readable, header: Header, table: U64Array, released: Runs
) -> Iterator[Write]:
    """Writes that lower a cluster's refcount by one for each time that it is released.

    A refcount that would fall below 0 is left as it is: whatever it is that it does count
    is better leaked than given away.

    Args:
        readable: Where the blocks are read from, each when its write is asked for.
        header: The image's header, for how wide refcounts are.
        table: The entries of the refcount table in use by then.
        released: Runs in any order, which may overlap: a cluster may be named several times.
    """
    entries = refcounts_per_block(header)
    # How often a cluster is named is how many runs are open there: for that, starts and
    # ends need not stay in pairs.
    starts, ends = np.sort(released.start), np.sort(released.end)
    for index in blocks_touched(released, header).tolist():
        offset = int(table[index]) if index < len(table) else 0
        if not offset:
            continue
        stored = unpack_refcounts(
            readable.read(offset, header.cluster_size), header.refcount_order
        ).astype(np.uint64)
        times = _times_named(starts, ends, index * entries, entries)
        lowered = np.flatnonzero((times > 0) & (times <= stored))
        refcounts = stored[lowered] - times[lowered]
        yield from refcount_writes(readable, header, table, lowered + index * entries, refcounts)


def _within_block(runs: Runs, index: int, entries: int) -> Clusters:
    """The clusters of the runs that block *index* counts, as positions in the block."""
    first = index * entries
    return runs_within(runs, first, first + entries).expanded() - first


def _times_named(starts: Clusters, ends: Clusters, first: int, count: int) -> U64Array:
    """How many of the runs with these ascending starts and ends cover each cluster.

    Returns:
        uint64[count], for clusters *first* to *first + count*.
    """
    opened = _positions(starts, first, count)
    closed = _positions(ends, first, count)
    before = np.searchsorted(starts, first) - np.searchsorted(ends, first)
    changes = np.bincount(opened, minlength=count) - np.bincount(closed, minlength=count)
    times: U64Array = (np.cumsum(changes) + before).astype(np.uint64)
    return times


def _positions(ascending: Clusters, first: int, count: int) -> Clusters:
    """The values from *first* to *first + count*, counted from *first*."""
    low, high = np.searchsorted(ascending, (first, first + count))
    return ascending[low:high] - first
