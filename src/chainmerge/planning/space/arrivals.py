# SPDX-License-Identifier: Apache-2.0
"""What base gets from the data that moves: new clusters and new L2 tables.

What counts is not what the images above define, but what QEMU's job writes. Facts from
QEMU 7.2 (block/mirror.c, block/io.c, block/qcow2-cluster.c), the same in 10.0:

- The job notes what is to be copied in *granules*: base's cluster size, but at least
  4 KiB and at most 64 KiB. A granule of which the merged images define anything is copied.
- It copies up to 1 MiB at once. Where the chain reads as zeros for at least a granule, and
  both ends of that are ends of base's clusters, it writes zeros, which become zero clusters.
- Otherwise it copies the zeros like data, up to 16 MiB of them. As long as base's clusters
  are no larger than a granule, base is opened with ``detect-zeroes``, so they become zero
  clusters after all. With larger ones they stay data: QEMU's qcow2 driver does not order
  writing zeros to a part of a cluster after a write to another part of it that is under way,
  and destroys base (seen with 7.2).
- Writing zeros to a version 2 base with a backing file always writes data, as it has no
  zero clusters.
- A cluster that base has for itself is written in place. One that is compressed, or that a
  snapshot shares, is not.
- Any write, of zeros too, needs an L2 table of base's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.arrays import BoolArray, U8Array, U64Array
from chainmerge.arithmetic.rounding import divide_up
from chainmerge.engines.qemu.granules import MAX_GRANULE, MIN_GRANULE, may_detect_zeroes
from chainmerge.planning.space.errors import CannotGrowBase
from chainmerge.qcow2.header import L1_ENTRY_BYTES, MAX_L1_BYTES, Header
from chainmerge.qcow2.mapping import COPIED, Kind
from chainmerge.qcow2.runs import Clusters, Runs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


COPY_BYTES = 1 << 20
ZERO_COPY_BYTES = 16 << 20


class MappedRuns(Protocol):
    """Runs of the guest's disk, ascending and without gaps: arrays of equal length.

    :class:`chainmerge.qcow2.mapping.Extents` is one, and so is what a view of several images
    resolves to.
    """

    @property
    def guest(self) -> U64Array:
        """Bytes."""

    @property
    def length(self) -> U64Array:
        """Bytes."""

    @property
    def kind(self) -> U8Array:
        """Values of :class:`Kind`."""

    @property
    def host(self) -> U64Array:
        """File offset in bytes of DATA and ZERO_ALLOCATED."""


class Arrivals(Struct, frozen=True):
    """What base allocates while data is copied into it.

    Attributes:
        clusters: New data clusters, at most.
        likely_clusters: The same if no run of zeros has to be written as data.
        l2_tables: New L2 tables, copies of those that snapshots share included.
        largest: Clusters that are asked for in one piece, at most.
        overwritten_end: The cluster behind the highest one of base's file that is written in
            place; 0 if none is.
    """

    clusters: int
    likely_clusters: int
    l2_tables: int
    largest: int
    overwritten_end: int


class BaseFacts(Struct, frozen=True):
    """What decides how base takes a write.

    Attributes:
        image: What messages call it.
        header: Its header.
        backing_size: Bytes of the guest's disk as its own backing file has it, None without.
        shared: Clusters of its file with a refcount above 1.
    """

    image: str
    header: Header
    backing_size: int | None
    shared: Runs

    @property
    def granule(self) -> int:
        """Bytes that the job copies at least."""
        return min(max(self.header.cluster_size, MIN_GRANULE), MAX_GRANULE)

    @property
    def unit(self) -> int:
        """Bytes of the guest's disk that get all their clusters if any byte is written."""
        return max(self.header.cluster_size, self.granule)

    @property
    def zeros_may_be_data(self) -> bool:
        """Whether QEMU may have no other way of writing zeros."""
        without_zero_clusters = self.header.version < 3 and self.backing_size is not None
        return without_zero_clusters or not may_detect_zeroes(self.header.cluster_size)

    def uncovers_backing(self, top_size: int) -> bool:
        """Whether growing to *top_size* bytes would let a longer backing file shine through."""
        size = self.header.virtual_size
        return self.backing_size is not None and size < min(top_size, self.backing_size)


def qemu_growth_obstacle(base: BaseFacts, top_size: int) -> CannotGrowBase | None:
    """Why QEMU cannot make base's disk as large as *top_size* bytes; None if it can or need not."""
    header = base.header
    if top_size <= header.virtual_size:
        return None
    reason = None
    if l1_entries(header, top_size) * L1_ENTRY_BYTES > MAX_L1_BYTES:
        reason = f"its L1 table would be longer than {MAX_L1_BYTES} bytes"
    elif header.version < 3 and header.snapshot_count:
        reason = "it is a version 2 image and has internal snapshots"
    elif header.version < 3 and base.uncovers_backing(top_size):
        reason = "it is a version 2 image and its backing file is longer"
    return None if reason is None else CannotGrowBase(base.image, top_size, reason)


def l1_entries(header: Header, virtual_size: int) -> int:
    """Entries of the L1 table that a disk of *virtual_size* bytes takes."""
    return divide_up(virtual_size, header.cluster_size * header.l2_entries)


def count_arrivals(
    base: BaseFacts,
    l1: U64Array,
    moved: Iterable[MappedRuns],
    present: Iterable[MappedRuns],
    top_size: int,
) -> Arrivals:
    """Count what base allocates. Memory in use is that of a few windows of runs.

    Args:
        base: base.
        l1: its L1 table, entries as stored.
        moved: what the merged images together define, from the guest's byte 0 to *top_size*;
            UNALLOCATED where they leave it to base.
        present: what base itself defines, from the guest's byte 0 to its end; its portions end
            where clusters end.
        top_size: bytes of the guest's disk as top has it.

    Raises:
        CannotGrowBase: base cannot take it, whatever the space.
    """
    obstacle = qemu_growth_obstacle(base, top_size)
    if obstacle is not None:
        raise obstacle
    header = base.header
    tables = _Tables(header, max(top_size, header.virtual_size))
    shared = _Counted(base.shared)
    clusters = likely = overwritten_end = 0
    feed = _Feed(_arriving(base, moved, top_size))
    for standing in _standing(header, present):
        for here in feed.until(standing.reached):
            tables.touch(here.start, here.end)
            fresh = _fresh(base, shared, here, standing.around(here))
            clusters, likely = clusters + fresh.at_most, likely + fresh.likely
            overwritten_end = max(overwritten_end, fresh.overwritten_end)
    for here in feed.rest():
        tables.touch(here.start, here.end)
        length = here.end - here.start
        data = int(length[~here.zero].sum())
        zeros = int(length[here.zero].sum()) if base.zeros_may_be_data else 0
        clusters, likely = clusters + data + zeros, likely + data
    if base.uncovers_backing(top_size):
        # Zeros go over all of the new area. An old end inside a cluster is padded with data.
        first, end = (
            header.virtual_size // header.cluster_size,
            divide_up(top_size, header.cluster_size),
        )
        tables.touch(np.array([first]), np.array([end]))
        padded = int(header.virtual_size % header.subcluster_size != 0)
        clusters, likely = clusters + padded, likely + padded
    if header.external_data_file:
        clusters = likely = 0
    largest = _largest_piece(base, zeros_as_data=clusters > likely)
    return Arrivals(clusters, likely, tables.count_new(l1), largest, overwritten_end)


def _largest_piece(base: BaseFacts, *, zeros_as_data: bool) -> int:
    """Clusters that one write request of the job asks for in one piece, at most.

    A request is cut where an L2 table ends. It starts at a granule, so it can touch one
    cluster more than its length where clusters are larger than that.
    """
    cluster_size = base.header.cluster_size
    at_once = ZERO_COPY_BYTES if zeros_as_data else COPY_BYTES
    unaligned = int(cluster_size > base.granule)
    return min(max(1, at_once // cluster_size) + unaligned, base.header.l2_entries)


class _Arriving(Struct, frozen=True):
    """Ranges of guest clusters that are written, ascending and disjoint: arrays [n].

    *zero* is where zeros are written to whole units. No later range starts below *reached*.
    """

    start: Clusters
    end: Clusters
    zero: BoolArray
    reached: int

    def cut(self, cluster: int) -> tuple[_Arriving, _Arriving]:
        """What lies below *cluster*, and the rest."""
        below = int(np.searchsorted(self.start, cluster))
        above = int(np.searchsorted(self.end, cluster, "right"))
        lower = np.minimum(self.end[:below], cluster)
        upper = np.maximum(self.start[above:], cluster)
        return (
            _Arriving(self.start[:below], lower, self.zero[:below], self.reached),
            _Arriving(upper, self.end[above:], self.zero[above:], self.reached),
        )


def _arriving(base: BaseFacts, moved: Iterable[MappedRuns], top_size: int) -> Iterator[_Arriving]:
    unit, cluster_size = base.unit, base.header.cluster_size
    scale = unit // cluster_size
    last = divide_up(top_size, cluster_size)
    covered = 0
    for runs in _long_runs(moved, top_size):
        first, behind = runs.start // unit, divide_up(runs.end, unit)
        whole_first, whole_behind = divide_up(runs.start, unit), runs.end // unit
        # All units of a run of data are data; of a run of zeros only those that it shares.
        head_behind = np.where(runs.zero, whole_first, behind)
        tail_first = np.where(runs.zero, whole_behind, behind)
        data_from = np.column_stack([first, tail_first]).ravel()
        data_to = np.column_stack([head_behind, behind]).ravel()
        reach = np.maximum.accumulate(np.concatenate(([covered], data_to)))
        data_from = np.maximum(data_from, reach[:-1])
        covered = int(reach[-1])
        data = data_from < data_to
        zero = runs.zero & (whole_first < whole_behind)
        start = np.concatenate([data_from[data], whole_first[zero]]) * scale
        end = np.concatenate([data_to[data], whole_behind[zero]]) * scale
        kind = np.repeat([False, True], [np.count_nonzero(data), np.count_nonzero(zero)])
        order = np.argsort(start, kind="stable")
        end = np.minimum(end[order], last)
        yield _Arriving(start[order], end, kind[order], runs.reached // unit * scale)


class _LongRuns(Struct, frozen=True):
    """Runs of guest bytes that are copied, as long as they get: arrays [n] and what follows.

    No later run starts below byte *reached*.
    """

    start: Clusters
    end: Clusters
    zero: BoolArray
    reached: int


def _long_runs(moved: Iterable[MappedRuns], top_size: int) -> Iterator[_LongRuns]:
    """Join runs of data, and runs of zeros, also where one window ends and the next begins."""
    start, end, zero = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.bool_))
    for window in moved:
        moves = window.kind != Kind.UNALLOCATED
        guest = window.guest[moves].astype(np.int64)
        is_zero = (window.kind == Kind.ZERO) | (window.kind == Kind.ZERO_ALLOCATED)
        start = np.concatenate([start, guest])
        end = np.concatenate([end, guest + window.length[moves].astype(np.int64)])
        zero = np.concatenate([zero, is_zero[moves]])
        if not len(start):
            continue
        joins = (start[1:] == end[:-1]) & (zero[1:] == zero[:-1])
        heads = np.flatnonzero(np.concatenate(([True], ~joins)))
        tails = np.append(heads[1:], len(start)) - 1
        start, end, zero = start[heads], end[tails], zero[heads]
        yield _LongRuns(start[:-1], end[:-1], zero[:-1], int(start[-1]))
        start, end, zero = start[-1:], end[-1:], zero[-1:]
    yield _LongRuns(start, end, zero, top_size)


class _Feed:
    """Hands out ranges by where they lie, from a source that yields them in other portions."""

    def __init__(self, source: Iterator[_Arriving]) -> None:
        self._source = source
        nothing = np.zeros(0, np.int64)
        self._held = _Arriving(nothing, nothing, np.zeros(0, np.bool_), 0)

    def until(self, cluster: int) -> Iterator[_Arriving]:
        """All that lies below *cluster* and was not handed out before; no portion is empty."""
        while True:
            handed, self._held = self._held.cut(cluster)
            if len(handed.start):
                yield handed
            if self._held.reached >= cluster or len(self._held.start):
                return
            more = next(self._source, None)
            if more is None:
                return
            self._held = more

    def rest(self) -> Iterator[_Arriving]:
        """All that was not handed out yet."""
        yield self._held
        yield from self._source


class _Standing(Struct, frozen=True):
    """Guest clusters that have a cluster in base's file: disjoint ranges, ascending, arrays [n].

    *host* is the number of each range's first cluster in the file. What of the clusters below
    *reached* is in no range has none that could be written to.
    """

    start: Clusters
    end: Clusters
    host: Clusters
    reached: int

    def around(self, arriving: _Arriving) -> _Standing:
        """The ranges that overlap what arrives, which is not empty, or lie between."""
        first = int(np.searchsorted(self.end, arriving.start[0], "right"))
        stop = int(np.searchsorted(self.start, arriving.end[-1]))
        chosen = slice(first, stop)
        return _Standing(self.start[chosen], self.end[chosen], self.host[chosen], self.reached)


def _standing(header: Header, present: Iterable[MappedRuns]) -> Iterator[_Standing]:
    cluster_size = header.cluster_size
    covered = 0
    for window in present:
        if not len(window.guest):
            continue
        stands = (window.kind == Kind.DATA) | (window.kind == Kind.ZERO_ALLOCATED)
        guest = window.guest[stands].astype(np.int64)
        end = divide_up(guest + window.length[stands].astype(np.int64), cluster_size)
        start = guest // cluster_size
        host = window.host[stands].astype(np.int64) // cluster_size
        # Several subclusters of one cluster give the same range of clusters.
        reach = np.maximum.accumulate(np.concatenate(([covered], end)))
        skipped = np.maximum(reach[:-1] - start, 0)
        covered = int(reach[-1])
        left = start + skipped < end
        behind = int(window.guest[-1]) + int(window.length[-1])
        yield _Standing(
            (start + skipped)[left],
            end[left],
            (host + skipped)[left],
            divide_up(behind, cluster_size),
        )


class _Fresh(Struct, frozen=True):
    """New clusters for what arrives somewhere; fields as in :class:`Arrivals`."""

    at_most: int
    likely: int
    overwritten_end: int


def _fresh(base: BaseFacts, shared: _Counted, here: _Arriving, standing: _Standing) -> _Fresh:
    # A stable sort takes next to no time for what is ascending in four pieces.
    bounds = np.sort(
        np.concatenate([here.start, here.end, standing.start, standing.end]), kind="stable"
    )
    first, length = bounds[:-1], np.diff(bounds)
    arriving, arrives = _position(here.start, here.end, first)
    place, stands = _position(standing.start, standing.end, first)
    place = place[stands]
    host = standing.host[place] + first[stands] - standing.start[place]
    fresh = length.copy()
    # A cluster that others share must be copied; one of base's own is written in place.
    fresh[stands] = shared.below(host + length[stands]) - shared.below(host)
    written = arrives[stands]
    overwritten_end = int((host + length[stands])[written].max(initial=0))
    zero = np.zeros(len(first), np.bool_)
    zero[arrives] = here.zero[arriving[arrives]]
    data = int(fresh[arrives & ~zero].sum())
    zeros = int(fresh[zero].sum()) if base.zeros_may_be_data else 0
    return _Fresh(data + zeros, data, overwritten_end)


def _position(start: Clusters, end: Clusters, points: Clusters) -> tuple[Clusters, BoolArray]:
    """Which of the ranges each point lies in, and whether it lies in any."""
    at = np.searchsorted(start, points, "right").astype(np.int64) - 1
    inside = at >= 0
    inside[inside] = points[inside] < end[at[inside]]
    return at, inside


class _Counted:
    """Runs of clusters, to be asked how many of theirs lie below a cluster."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._before = np.concatenate(([0], np.cumsum(runs.length)))

    def below(self, clusters: Clusters) -> Clusters:
        """How many clusters of the runs lie below each of *clusters*."""
        if not len(self._runs.start):
            return np.zeros(len(clusters), np.int64)
        at = np.searchsorted(self._runs.start, clusters, "right")
        beyond = np.where(at > 0, np.maximum(self._runs.end[at - 1] - clusters, 0), 0)
        below: Clusters = self._before[at] - beyond
        return below


class _Tables:
    """Which L2 tables are written to."""

    def __init__(self, header: Header, virtual_size: int) -> None:
        self._l2_entries = header.l2_entries
        self._steps = np.zeros(l1_entries(header, virtual_size) + 1, np.int64)

    def touch(self, start: Clusters, end: Clusters) -> None:
        """Write to guest clusters *start* to *end*, ranges that are not empty."""
        np.add.at(self._steps, start // self._l2_entries, 1)
        np.add.at(self._steps, (end - 1) // self._l2_entries + 1, -1)

    def count_new(self, l1: U64Array) -> int:
        """Tables written to that base does not have for itself, by its L1 table."""
        touched = np.cumsum(self._steps)[:-1] > 0
        own = l1[: len(touched)].astype(np.uint64) & np.uint64(COPIED) != 0
        return int(np.count_nonzero(touched)) - int(np.count_nonzero(touched[: len(own)] & own))
