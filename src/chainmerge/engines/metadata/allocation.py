# SPDX-License-Identifier: Apache-2.0
"""Which free clusters new metadata goes to, and which refcount blocks that takes.

Clusters are taken lowest first, so that an image is packed low and the file grows as
little as it can. A cluster counts as free where its stored refcount is 0. That is safe
in an image without corruptions: nothing refers to such a cluster, neither now nor in
the state that a crash brings back.

A cluster in a range that no refcount block describes yet costs a new block, which is a
new cluster itself, and a block behind the end of the refcount table costs a new, longer
table. :func:`allocate` looks for the fixed point of this.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from chainmerge.engines.metadata.errors import RefcountTableFull
from chainmerge.qcow2.header import MAX_REFCOUNT_TABLE_BYTES, Header
from chainmerge.qcow2.refcounts import (
    U64Array,
    read_refcount_table,
    read_refcounts,
    refcounts_per_block,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.qcow2.image import Qcow2Image

Clusters = npt.NDArray[np.int64]
"""Cluster numbers (file offset / cluster size), or counts of clusters."""

_TABLE_ENTRY_BYTES = 8
_WINDOW_CLUSTERS = 1 << 20
# Host offsets have 56 bits (specification, "Standard Cluster Descriptor").
_MAX_FILE_BYTES = 1 << 56


@dataclass(frozen=True, slots=True)
class Demand:
    """How many clusters are wanted.

    Attributes:
        scattered: Clusters that may lie anywhere.
        contiguous: Lengths, in clusters, of what must lie in one piece.
    """

    scattered: int
    contiguous: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NewBlocks:
    """Refcount blocks to make: arrays of equal length.

    Attributes:
        index: Positions in the refcount table.
        cluster: Where each block goes.
    """

    index: Clusters
    cluster: Clusters


@dataclass(frozen=True, slots=True)
class Allocation:
    """Clusters that are free in the image as it is, by purpose.

    Attributes:
        scattered: For :attr:`Demand.scattered`, ascending.
        contiguous: First cluster of each piece, in the order of the demand.
        blocks: New refcount blocks. Each lies in a range that the image describes already
            or in the range that it describes itself, unless there is a new table.
        table_start: First cluster of a new refcount table, None where the old one does.
        table_clusters: Length of that table in clusters; 0 without one.
        everything: All of the above, ascending.
    """

    scattered: Clusters
    contiguous: Clusters
    blocks: NewBlocks
    table_start: int | None
    table_clusters: int
    everything: Clusters

    @property
    def end(self) -> int:
        """The cluster behind the highest new one; 0 if there is none."""
        return int(self.everything[-1]) + 1 if len(self.everything) else 0


def allocate(image: Qcow2Image, demand: Demand) -> Allocation:
    """Find clusters for *demand* and for the refcounts of what is found.

    Raises:
        RefcountTableFull: the refcount table would need more than the 8 MiB that QEMU reads.
    """
    table = read_refcount_table(image)
    new_table = _NewTable(image, table)
    blocks = 0
    while True:
        attempt = _attempt(image, demand, blocks, new_table.clusters)
        missing = _missing_blocks(attempt.everything, table, refcounts_per_block(image.header))
        if len(missing) > blocks:
            # More clusters can only touch more ranges, so this ends at the least number.
            blocks = len(missing)
        elif new_table.must_grow(missing):
            blocks = 0
        else:
            homes = _block_homes(attempt.scattered, missing, table, image.header, new_table)
            if homes is not None:
                return _finished(attempt, missing, homes, new_table.clusters)
            new_table.replace()
            blocks = 0


class _NewTable:
    """How long a refcount table that replaces the old one has to be."""

    def __init__(self, image: Qcow2Image, table: U64Array) -> None:
        self._name = image.name
        self._cluster_size = image.header.cluster_size
        self._old_clusters = image.header.refcount_table_clusters
        self._entries = len(table)
        self.clusters = 0

    def must_grow(self, missing: Clusters) -> bool:
        """Whether blocks at these indexes need a longer table than was allowed for so far."""
        entries = int(missing[-1]) + 1 if len(missing) else 0
        if entries <= self._entries:
            return False
        needed = -(-entries * _TABLE_ENTRY_BYTES // self._cluster_size)
        if needed * self._cluster_size > MAX_REFCOUNT_TABLE_BYTES:
            raise RefcountTableFull(self._name, MAX_REFCOUNT_TABLE_BYTES)
        self._entries = needed * self._cluster_size // _TABLE_ENTRY_BYTES
        self.clusters = needed
        return True

    def replace(self) -> None:
        """Use a new table although the old one would be long enough."""
        self.clusters = self._old_clusters


@dataclass(frozen=True, slots=True)
class _Attempt:
    """Clusters found, blocks still among the scattered ones and the table among the pieces."""

    scattered: Clusters
    contiguous: Clusters
    everything: Clusters


def _attempt(image: Qcow2Image, demand: Demand, blocks: int, table_clusters: int) -> _Attempt:
    pieces = demand.contiguous + ((table_clusters,) if table_clusters else ())
    scattered = demand.scattered + blocks
    enough = scattered + sum(pieces)
    lengths = np.array(pieces, dtype=np.int64)
    starts = _place_pieces(free_runs(image, enough), lengths)
    taken = _expanded(starts, lengths)
    single = _lowest(free_runs(image, enough), scattered, np.sort(taken))
    return _Attempt(single, starts, np.sort(np.concatenate([single, taken])))


def _missing_blocks(clusters: Clusters, table: U64Array, entries: int) -> Clusters:
    """Indexes of the refcount blocks that *clusters* need and the table does not have."""
    touched = np.unique(clusters // entries)
    return touched[~_described(touched, table)]


def _described(blocks: Clusters, table: U64Array) -> npt.NDArray[np.bool_]:
    inside = blocks < len(table)
    described = np.zeros(len(blocks), dtype=np.bool_)
    described[inside] = table[blocks[inside]] != 0
    return described


def _block_homes(
    scattered: Clusters,
    missing: Clusters,
    table: U64Array,
    header: Header,
    new_table: _NewTable,
) -> Clusters | None:
    """A cluster for each missing block, from the scattered ones; None where that is unsafe.

    Blocks are linked into the old table one by one before the switch, in any order that a
    crash makes of it. A linked block whose own refcount stands in another new block would
    then be counted nowhere: a corruption. So a block describes itself, or is described
    already, or else all blocks come into use at once, by a new table.
    """
    entries = refcounts_per_block(header)
    first = np.searchsorted(scattered, missing * entries)
    found = first < np.searchsorted(scattered, (missing + 1) * entries)
    homes = np.where(found, first, -1)
    spare = np.ones(len(scattered), dtype=np.bool_)
    spare[homes[found]] = False
    if not new_table.clusters:
        spare &= _described(scattered // entries, table)
    candidates = np.flatnonzero(spare)
    homeless = np.flatnonzero(~found)
    if len(candidates) < len(homeless):
        return None
    homes[homeless] = candidates[len(candidates) - len(homeless) :]
    return scattered[homes]


def _finished(
    attempt: _Attempt, missing: Clusters, homes: Clusters, table_clusters: int
) -> Allocation:
    pieces = attempt.contiguous
    return Allocation(
        scattered=np.setdiff1d(attempt.scattered, homes, assume_unique=True),
        contiguous=pieces[:-1] if table_clusters else pieces,
        blocks=NewBlocks(missing, homes),
        table_start=int(pieces[-1]) if table_clusters else None,
        table_clusters=table_clusters,
        everything=attempt.everything,
    )


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of clusters: arrays of equal length, ascending and not touching."""

    start: Clusters
    length: Clusters


def free_runs(image: Qcow2Image, enough: int) -> Iterator[Runs]:
    """Runs of clusters with stored refcount 0, ascending, in windows of bounded size.

    Ends with the first run of at least *enough* clusters, which may be cut there; there
    always is one, because a file has no end.
    """
    entries = refcounts_per_block(image.header)
    present = np.flatnonzero(read_refcount_table(image))
    described_end = (int(present[-1]) + 1) * entries if len(present) else 0
    held = Runs(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    for first in range(0, described_end, _WINDOW_CLUSTERS):
        count = min(_WINDOW_CLUSTERS, described_end - first)
        found = _joined(held, _zero_runs(read_refcounts(image, first, count), first))
        big = np.flatnonzero(found.length >= enough)
        if len(big):
            yield Runs(found.start[: big[0] + 1], found.length[: big[0] + 1])
            return
        # The last run may go on in the next window.
        goes_on = len(found.start) and found.start[-1] + found.length[-1] == first + count
        cut = len(found.start) - 1 if goes_on else len(found.start)
        yield Runs(found.start[:cut], found.length[:cut])
        held = Runs(found.start[cut:], found.length[cut:])
    last = _MAX_FILE_BYTES // image.header.cluster_size
    endless = np.array([described_end]), np.array([last - described_end])
    yield _joined(held, Runs(*endless))


def _zero_runs(refcounts: U64Array, first: int) -> Runs:
    free = np.concatenate(([False], refcounts == 0, [False]))
    edges = np.flatnonzero(free[1:] != free[:-1])
    return Runs(edges[0::2] + first, edges[1::2] - edges[0::2])


def _joined(left: Runs, right: Runs) -> Runs:
    """*left*, which has at most one run, and *right*, with the runs between them joined."""
    if not len(left.start):
        return right
    if not len(right.start) or right.start[0] != left.start[0] + left.length[0]:
        return Runs(
            np.concatenate([left.start, right.start]), np.concatenate([left.length, right.length])
        )
    length = right.length.copy()
    length[0] += left.length[0]
    return Runs(np.concatenate([left.start, right.start[1:]]), length)


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


def _lowest(windows: Iterator[Runs], count: int, taken: Clusters) -> Clusters:
    """The lowest *count* clusters of the windows without those in *taken* (ascending)."""
    found: list[Clusters] = []
    wanted = count
    for window in windows:
        if wanted <= 0:
            break
        # Clusters that are taken stand among the lowest too, so that many more are looked at.
        clusters = _expanded_up_to(window, wanted + len(taken))
        fresh = clusters[~_contains(taken, clusters)][:wanted]
        found.append(fresh)
        wanted -= len(fresh)
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _contains(ascending: Clusters, values: Clusters) -> npt.NDArray[np.bool_]:
    if not len(ascending):
        return np.zeros(len(values), dtype=np.bool_)
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    found: npt.NDArray[np.bool_] = ascending[at] == values
    return found


def _expanded_up_to(runs: Runs, count: int) -> Clusters:
    """The first *count* clusters of the runs."""
    before = np.cumsum(runs.length) - runs.length
    kept = before < count
    lengths = np.minimum(runs.length[kept], count - before[kept])
    return _expanded(runs.start[kept], lengths)


def _expanded(starts: Clusters, lengths: Clusters) -> Clusters:
    """Every cluster of the runs, in their order."""
    before = np.cumsum(lengths) - lengths
    total = int(lengths.sum())
    expanded: Clusters = np.repeat(starts - before, lengths) + np.arange(total, dtype=np.int64)
    return expanded


def runs_of(clusters: Sequence[int] | Clusters) -> Runs:
    """Ascending cluster numbers as runs."""
    values = np.asarray(clusters, dtype=np.int64)
    breaks = np.flatnonzero(np.diff(values) != 1) + 1
    first = np.concatenate(([0], breaks)) if len(values) else breaks
    lengths = np.diff(np.concatenate((first, [len(values)]))) if len(values) else breaks
    return Runs(values[first], lengths)


def slices_by(values: Clusters, size: int) -> Iterator[slice]:
    """Slices of ascending *values* within which ``value // size`` is the same."""
    heads = np.flatnonzero(np.diff(values // size, prepend=-1)).tolist()
    for head, end in pairwise([*heads, len(values)]):
        yield slice(head, end)
