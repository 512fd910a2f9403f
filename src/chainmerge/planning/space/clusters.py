# SPDX-License-Identifier: Apache-2.0
"""Which clusters of a file are free, and what is left when some are taken or given back."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from chainmerge.arithmetic.arrays import BoolArray
from chainmerge.arithmetic.rounding import divide_up
from chainmerge.qcow2.runs import NO_RUNS, Runs, joined_runs, runs_where

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

TABLE_ENTRY_BYTES = 8
MAX_RUNS = 1 << 20

# Host offsets have 56 bits (specification, "Standard Cluster Descriptor").
_MAX_FILE_BYTES = 1 << 56


class HostLayout(Struct, frozen=True):
    """What is known of an image's file for placing something new in it.

    Attributes:
        cluster_size: Bytes.
        per_block: Clusters that one refcount block describes.
        end: The cluster behind the last one in use.
        free: Free clusters below *end*. Short runs may be missing; that only makes needs larger.
        shared: Clusters with a refcount above 1, which QEMU does not write to but copies. May
            hold others too; that only makes needs larger.
        blocks: For each entry of the refcount table, whether there is a block: bool[entries].
    """

    cluster_size: int
    per_block: int
    end: int
    free: Runs
    shared: Runs
    blocks: BoolArray

    @property
    def used(self) -> int:
        """Clusters in use."""
        return self.end - self.free.total

    @property
    def per_table_cluster(self) -> int:
        """Refcount table entries in a cluster of it."""
        return self.cluster_size // TABLE_ENTRY_BYTES

    def usable(self, largest: int) -> int:
        """Free clusters below the end that are taken for sure before anything behind it is.

        First fit for requests of at most *largest* clusters in one piece: a run is passed over
        only for a request that does not fit into what is left of it, so at most
        ``largest - 1`` of its clusters go to waste.
        """
        return int(np.maximum(self.free.length - (largest - 1), 0).sum())

    def missing_blocks(self, end: int) -> int:
        """Refcount blocks that there are not yet for the clusters below *end*."""
        count = divide_up(end, self.per_block)
        return count - int(np.count_nonzero(self.blocks[:count]))


def layout_of(
    windows: Iterable[npt.NDArray[np.unsignedinteger]],
    blocks: BoolArray,
    cluster_size: int,
    per_block: int,
) -> HostLayout:
    """Sum up the refcounts of an image.

    Args:
        windows: refcounts of consecutive clusters from the file's first on, in pieces.
        blocks: whether there is a refcount block, for each entry of the refcount table.
        cluster_size: bytes.
        per_block: clusters that one refcount block describes.
    """
    free, shared = NO_RUNS, NO_RUNS
    first = end = 0
    for refcounts in windows:
        used = np.flatnonzero(refcounts)
        if len(used):
            end = first + int(used[-1]) + 1
        free = _bounded_from_below(joined_runs([free, runs_where(refcounts == 0, first)]))
        shared = _bounded_from_above(joined_runs([shared, runs_where(refcounts > 1, first)]))
        first += len(refcounts)
    below = free.start < end
    return HostLayout(
        cluster_size, per_block, end, Runs(free.start[below], free.length[below]), shared, blocks
    )


def _bounded_from_below(runs: Runs) -> Runs:
    """At most MAX_RUNS of the runs, the longest; the last one always, as it may go on."""
    if len(runs.start) <= MAX_RUNS:
        return runs
    longest = np.argpartition(runs.length[:-1], -(MAX_RUNS - 1))[-(MAX_RUNS - 1) :]
    kept = np.append(np.sort(longest), len(runs.start) - 1)
    return Runs(runs.start[kept], runs.length[kept])


def _bounded_from_above(runs: Runs) -> Runs:
    """At most MAX_RUNS runs that cover the given ones."""
    if len(runs.start) <= MAX_RUNS:
        return runs
    first = int(runs.start[0])
    return Runs(np.array([first]), np.array([int(runs.end[-1]) - first]))


def release(layout: HostLayout, given_back: Runs) -> HostLayout:
    """The layout when *given_back*, which is in use, is free again."""
    free = joined_runs([layout.free, given_back])
    end = layout.end
    if len(free.start) and int(free.end[-1]) == end:
        end = int(free.start[-1])
        free = Runs(free.start[:-1], free.length[:-1])
    return replace(layout, free=free, end=end)


def place_clusters(
    layout: HostLayout, pieces: Sequence[int], singles: int
) -> tuple[HostLayout, Runs]:
    """Take clusters as :mod:`chainmerge.engines.metadata` does; returns what was taken too.

    That is: the longest piece first, each into the first run that it fits into, then
    *singles* one by one into the lowest clusters left; and for refcounts of what was taken
    a single cluster for each new block and a piece for a longer table.

    Args:
        layout: where to.
        pieces: lengths in clusters of what must lie in one piece.
        singles: clusters that may lie anywhere.
    """
    blocks, entries, table = 0, len(layout.blocks), 0
    while True:
        lengths = [*pieces, table] if table else pieces
        free, taken = _first_fit(layout, lengths, singles + blocks)
        touched = _touched_blocks(taken, layout.per_block)
        described = np.zeros(max(len(touched), entries), dtype=np.bool_)
        described[: len(layout.blocks)] = layout.blocks
        missing = int(np.count_nonzero(touched & ~described[: len(touched)]))
        if len(touched) > entries:
            table = divide_up(len(touched), layout.per_table_cluster)
            entries = table * layout.per_table_cluster
        elif missing > blocks:
            blocks = missing
        else:
            break
    described[: len(touched)] |= touched
    endless = int(free.start[-1])
    left = free.length > 0
    left[-1] = False
    remaining = Runs(free.start[left], free.length[left])
    return replace(layout, free=remaining, end=endless, blocks=described), taken


def _first_fit(layout: HostLayout, pieces: Sequence[int], singles: int) -> tuple[Runs, Runs]:
    """What is free afterwards, the endless run behind the file's end last, and what is taken."""
    endless = _MAX_FILE_BYTES // layout.cluster_size - layout.end
    start = np.append(layout.free.start, layout.end)
    length = np.append(layout.free.length, endless)
    taken = [NO_RUNS]
    wanted = sorted(Counter(pieces).items(), reverse=True)
    for size, count in [*wanted, (1, singles)]:
        fitting = length // size
        before = np.cumsum(fitting) - fitting
        used = np.clip(count - before, 0, fitting) * size
        chosen = np.flatnonzero(used)
        taken.append(Runs(start[chosen], used[chosen]))
        start, length = start + used, length - used
    return Runs(start, length), joined_runs([*taken])


def _touched_blocks(taken: Runs, per_block: int) -> BoolArray:
    """Which refcount blocks describe any of the clusters: up to the last of them."""
    if not len(taken.start):
        return np.zeros(0, dtype=np.bool_)
    first, last = taken.start // per_block, (taken.end - 1) // per_block
    steps = np.zeros(int(last[-1]) + 2, dtype=np.int64)
    np.add.at(steps, first, 1)
    np.add.at(steps, last + 1, -1)
    return np.cumsum(steps)[:-1] > 0
