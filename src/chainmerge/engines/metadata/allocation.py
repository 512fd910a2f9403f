# SPDX-License-Identifier: Apache-2.0
"""Which free clusters new metadata goes to, and which refcount blocks that takes.

Clusters are taken lowest first, so that an image is packed low and the file grows as
little as it can. A cluster counts as free where its stored refcount is 0. That is safe
in an image without corruptions: nothing refers to such a cluster, neither now nor in
the state that a crash brings back. A plan that is made before leaked clusters are given
back counts these as free as well, by the recomputed refcounts.

Clusters are handled in runs: an image of many TiB that is mostly free or mostly used
costs no more memory than a small one.

A cluster in a range that no refcount block describes yet costs a new block, which is a
new cluster itself, and a block behind the end of the refcount table costs a new, longer
table. :func:`allocate` looks for the fixed point of this.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.arrays import U64Array
from chainmerge.arithmetic.distinct import distinct
from chainmerge.engines.metadata.errors import RefcountTableFull
from chainmerge.qcow2.header import MAX_REFCOUNT_TABLE_BYTES, Header
from chainmerge.qcow2.refcounts import read_refcount_table, read_refcounts, refcounts_per_block
from chainmerge.qcow2.runs import (
    NO_RUNS,
    Clusters,
    Runs,
    joined_runs,
    runs_of,
    runs_where,
    single_run,
    split_runs,
    without_runs,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.qcow2.image import Qcow2Image
    from chainmerge.qcow2.references import ReferenceCounts

_TABLE_ENTRY_BYTES = 8
_WINDOW_CLUSTERS = 1 << 20

# Host offsets have 56 bits (specification, "Standard Cluster Descriptor").
_MAX_FILE_BYTES = 1 << 56


class Demand(Struct, frozen=True):
    """How many clusters are wanted.

    Attributes:
        scattered: Clusters that may lie anywhere.
        contiguous: Lengths, in clusters, of what must lie in one piece.
    """

    scattered: int
    contiguous: tuple[int, ...]


class NewBlocks(Struct, frozen=True):
    """Refcount blocks to make: arrays of equal length.

    Attributes:
        index: Positions in the refcount table.
        cluster: Where each block goes.
    """

    index: Clusters
    cluster: Clusters


class Allocation(Struct, frozen=True):
    """Clusters that are free in the image as it is, by purpose.

    Attributes:
        scattered: For :attr:`Demand.scattered`.
        contiguous: First cluster of each piece, in the order of the demand.
        blocks: New refcount blocks. Each lies in a range that the image describes already
            or in the range that it describes itself, unless there is a new table.
        table_start: First cluster of a new refcount table, None if the old one does.
        table_clusters: Length of that table in clusters; 0 without one.
        everything: All of the above; these runs do not touch.
    """

    scattered: Runs
    contiguous: Clusters
    blocks: NewBlocks
    table_start: int | None
    table_clusters: int
    everything: Runs

    @property
    def end(self) -> int:
        """The cluster behind the highest new one; 0 if there is none."""
        ends = self.everything.end
        return int(ends[-1]) if len(ends) else 0


class FreeSpace(Struct, frozen=True):
    """Which clusters of an image are free, and what counts them once they are used.

    Attributes:
        name: What messages call the image.
        header: The image's header.
        table: The entries of its refcount table as they are stored.
        known: Every cluster from here on is free.
        uses: How often *count* clusters from *first* on are used, for (first, count);
            0 for a free one.
    """

    name: str
    header: Header
    table: U64Array
    known: int
    uses: Callable[[int, int], U64Array]

    def free_runs(self, enough: int) -> Iterator[Runs]:
        """Runs of free clusters, ascending and not touching, in windows of bounded size.

        Ends with the first run of at least *enough* clusters, which may be cut there; there
        always is one, because a file has no end.
        """
        held = NO_RUNS
        for first in range(0, self.known, _WINDOW_CLUSTERS):
            count = min(_WINDOW_CLUSTERS, self.known - first)
            found = joined_runs([held, runs_where(self.uses(first, count) == 0, first)])
            big = np.flatnonzero(found.length >= enough)
            if len(big):
                yield Runs(found.start[: big[0] + 1], found.length[: big[0] + 1])
                return
            # The last run may go on in the next window.
            goes_on = len(found.start) and found.end[-1] == first + count
            cut = len(found.start) - 1 if goes_on else len(found.start)
            yield Runs(found.start[:cut], found.length[:cut])
            held = Runs(found.start[cut:], found.length[cut:])
        last = _MAX_FILE_BYTES // self.header.cluster_size
        yield joined_runs([held, single_run(self.known, last - self.known)])


def stored_free_space(image: Qcow2Image) -> FreeSpace:
    """What is free by the stored refcounts; the image must have no corruptions."""
    table = read_refcount_table(image)
    present = np.flatnonzero(table)
    described = (int(present[-1]) + 1) * refcounts_per_block(image.header) if len(present) else 0

    def stored(first: int, count: int) -> U64Array:
        return read_refcounts(image, first, count)

    return FreeSpace(image.name, image.header, table, described, stored)


def counted_free_space(image: Qcow2Image, references: ReferenceCounts) -> FreeSpace:
    """What is free once leaked clusters are given back.

    Only a plan may be made with this: until that is done, the refcount of a cluster that
    counts as free here need not be 0.

    Args:
        image: The image; it must have no corruptions.
        references: Its recomputed refcounts, complete ones.
    """
    table = read_refcount_table(image)
    return FreeSpace(image.name, image.header, table, len(references.counts), references.of)


def allocate(space: FreeSpace, demand: Demand) -> Allocation:
    """Find clusters for *demand* and for the refcounts of what is found.

    Raises:
        RefcountTableFull: the refcount table would need more than the 8 MiB that QEMU reads.
    """
    new_table = _NewTable(space)
    blocks = 0
    while True:
        attempt = _attempt(space, demand, blocks, new_table.clusters)
        missing = _missing_blocks(attempt.everything, space)
        if len(missing) > blocks:
            # More clusters can only touch more ranges, so this ends at the least number.
            blocks = len(missing)
        elif new_table.must_grow(missing):
            blocks = 0
        else:
            homes = _block_homes(attempt.scattered, missing, space.header, new_table)
            if homes is not None:
                return _finished(attempt, missing, homes, new_table.clusters)
            new_table.replace()
            blocks = 0


def allocate_with_all_blocks(space: FreeSpace, demand: Demand, counted: Clusters) -> Allocation:
    """Find clusters for *demand*, and for refcounts that are rewritten as a whole.

    Args:
        space: What is free; its refcount table does not matter.
        demand: What is wanted besides.
        counted: Indexes of the refcount blocks, ascending, that what is in use needs.

    Returns:
        An allocation with a new table and every block that there is to be in it.

    Raises:
        RefcountTableFull: the refcount table would need more than the 8 MiB that QEMU reads.
    """
    header = space.header
    blocks = len(counted)
    entries = int(counted[-1]) + 1 if len(counted) else 1
    while True:
        table_clusters = _table_clusters(space.name, header, entries)
        attempt = _attempt(space, demand, blocks, table_clusters)
        needed = distinct(np.concatenate([counted, blocks_touched(attempt.everything, header)]))
        if len(needed) <= blocks and int(needed[-1]) < entries:
            break
        # Both only ever grow, and what they are can touch no more ranges than there are.
        blocks = max(blocks, len(needed))
        entries = max(entries, int(needed[-1]) + 1)
    kept, homes = split_runs(attempt.scattered, demand.scattered)
    homes, surplus = split_runs(homes, len(needed))
    return Allocation(
        scattered=kept,
        contiguous=attempt.contiguous[:-1],
        blocks=NewBlocks(needed, homes.expanded()),
        table_start=int(attempt.contiguous[-1]),
        table_clusters=table_clusters,
        everything=without_runs(attempt.everything, surplus),
    )


def _table_clusters(name: str, header: Header, entries: int) -> int:
    """How many clusters a refcount table of at least *entries* entries takes."""
    clusters = -(-entries * _TABLE_ENTRY_BYTES // header.cluster_size)
    if clusters * header.cluster_size > MAX_REFCOUNT_TABLE_BYTES:
        raise RefcountTableFull(name, MAX_REFCOUNT_TABLE_BYTES)
    return clusters


class _NewTable:
    """How long a refcount table that replaces the old one has to be."""

    def __init__(self, space: FreeSpace) -> None:
        self._name = space.name
        self._header = space.header
        self._cluster_size = space.header.cluster_size
        self._old_clusters = space.header.refcount_table_clusters
        self._entries = len(space.table)
        self.clusters = 0

    def must_grow(self, missing: Clusters) -> bool:
        """Whether blocks at these indexes need a longer table than was allowed for so far."""
        entries = int(missing[-1]) + 1 if len(missing) else 0
        if entries <= self._entries:
            return False
        needed = _table_clusters(self._name, self._header, entries)
        self._entries = needed * self._cluster_size // _TABLE_ENTRY_BYTES
        self.clusters = needed
        return True

    def replace(self) -> None:
        """Use a new table although the old one would be long enough."""
        self.clusters = self._old_clusters


class _Attempt(Struct, frozen=True):
    """Clusters found, blocks still among the scattered ones and the table among the pieces."""

    scattered: Runs
    contiguous: Clusters
    everything: Runs


def _attempt(space: FreeSpace, demand: Demand, blocks: int, table_clusters: int) -> _Attempt:
    pieces = demand.contiguous + ((table_clusters,) if table_clusters else ())
    scattered = demand.scattered + blocks
    enough = scattered + sum(pieces)
    lengths = np.array(pieces, dtype=np.int64)
    starts = _place_pieces(space.free_runs(enough), lengths)
    taken = joined_runs([Runs(starts, lengths)])
    single = _lowest(space.free_runs(enough), scattered, taken)
    return _Attempt(single, starts, joined_runs([single, taken]))


def _missing_blocks(clusters: Runs, space: FreeSpace) -> Clusters:
    """Indexes of the refcount blocks that *clusters* need and the table does not have."""
    touched = blocks_touched(clusters, space.header)
    described = np.zeros(len(touched), dtype=np.bool_)
    inside = touched < len(space.table)
    described[inside] = space.table[touched[inside]] != 0
    return touched[~described]


def _block_homes(
    scattered: Runs, missing: Clusters, header: Header, new_table: _NewTable
) -> Clusters | None:
    """A cluster for each missing block, from the scattered ones; None if that is unsafe.

    Blocks are linked into the old table one by one before the switch, in any order that a
    crash makes of it. A linked block whose own refcount stands in another new block would
    then be counted nowhere: a corruption. So a block describes itself, or is described
    already, or else all blocks come into use at once, by a new table.
    """
    entries = refcounts_per_block(header)
    homes = _first_clusters_from(scattered, missing * entries)
    found = homes < (missing + 1) * entries
    spare = without_runs(scattered, runs_of(homes[found]))
    if not new_table.clusters:
        undescribed = runs_of(missing)
        spare = without_runs(spare, Runs(undescribed.start * entries, undescribed.length * entries))
    homeless = len(missing) - int(np.count_nonzero(found))
    if spare.total < homeless:
        return None
    _, highest = split_runs(spare, spare.total - homeless)
    homes[~found] = highest.expanded()
    return homes


def _first_clusters_from(runs: Runs, clusters: Clusters) -> Clusters:
    """The first cluster of the runs from each of *clusters* on; the largest int64 for none."""
    at = np.searchsorted(runs.end, clusters, "right")
    starts = np.append(runs.start, np.iinfo(np.int64).max)
    first: Clusters = np.maximum(starts[at], clusters)
    return first


def _finished(
    attempt: _Attempt, missing: Clusters, homes: Clusters, table_clusters: int
) -> Allocation:
    pieces = attempt.contiguous
    return Allocation(
        scattered=without_runs(attempt.scattered, runs_of(np.sort(homes))),
        contiguous=pieces[:-1] if table_clusters else pieces,
        blocks=NewBlocks(missing, homes),
        table_start=int(pieces[-1]) if table_clusters else None,
        table_clusters=table_clusters,
        everything=attempt.everything,
    )


def _place_pieces(windows: Iterator[Runs], lengths: Clusters) -> Clusters:
    """First fit for pieces of the given lengths, longest first: the start of each."""
    starts = np.full(len(lengths), -1, dtype=np.int64)
    pending = [int(number) for number in np.argsort(-lengths, kind="stable")]
    for window in windows:
        if not pending:
            break
        start, length = window.start.copy(), window.length.copy()
        refused = None
        for number in pending:
            wanted = int(lengths[number])
            if wanted == refused:
                continue
            fitting = np.flatnonzero(length >= wanted)
            if not len(fitting):
                refused = wanted
                continue
            run = fitting[0]
            starts[number] = start[run]
            start[run] += wanted
            length[run] -= wanted
        pending = [number for number in pending if starts[number] < 0]
    return starts


def _lowest(windows: Iterator[Runs], count: int, taken: Runs) -> Runs:
    """The lowest *count* clusters of the windows without those that are taken."""
    found: list[Runs] = []
    wanted = count
    for window in windows:
        if wanted <= 0:
            break
        fresh, _ = split_runs(without_runs(window, taken), wanted)
        found.append(fresh)
        wanted -= fresh.total
    return joined_runs(found)


def blocks_touched(runs: Runs, header: Header) -> Clusters:
    """Indexes of the refcount blocks that count clusters of the runs, ascending."""
    entries = refcounts_per_block(header)
    first = runs.start // entries
    last = (runs.end - 1) // entries
    return joined_runs([Runs(first, last - first + 1)]).expanded()


def slices_by(values: Clusters, size: int) -> Iterator[slice]:
    """Slices of ascending *values* within which ``value // size`` is the same."""
    heads = np.flatnonzero(np.diff(values // size, prepend=-1)).tolist()
    for head, end in pairwise([*heads, len(values)]):
        yield slice(head, end)
