# SPDX-License-Identifier: Apache-2.0
"""The size that base must have so that no step of a merge runs out of space.

The steps that take clusters in base, in their order:

1. *Prune*: our own metadata writer puts the stand-ins (tombstones) beside the old bitmaps,
   frees these, and does it again to get the stand-ins low. It places first fit, so the
   outcome is known to the cluster.
2. *Copy*: QEMU makes base's disk larger (a longer L1 table beside the old one), and
   allocates data clusters, L2 tables and refcount blocks as data arrives.
3. *Close*: QEMU writes all bitmaps of base anew before it frees the old ones. These are the
   stand-ins: a table each and the directory, no data.
4. *Store*: our metadata writer puts the final bitmaps beside the stand-ins.

Where QEMU (7.2, block/qcow2-refcount.c; the same in 10.0) puts a cluster depends on the
timing of 16 requests in flight, so for steps 2 to 4 only a bound can be had. QEMU searches
upward from where it stopped last, for the whole request in one piece, and does not come
back to a gap that was too short. From that follow the waste of
:meth:`chainmerge.planning.space.clusters.HostLayout.usable` and this bound: new clusters behind the
file's present end are at most the clusters requested minus those usable below it. There is
one exception: a request that begins with a cluster that is written in place goes on in the
cluster behind that if it is free, also where that is behind the end.

A refcount table that is too short makes QEMU leave the rest of the area described by the
last refcount block, and start the next area with a new table, half as large again, and the
blocks for it.

How good the bound is: see the property test. What makes it larger than what is used in the
end: free gaps between clusters in use (up to a MiB each), the copies of the bitmaps
that are gone again, and zeros that may have to be written as data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from chainmerge.arithmetic.rounding import divide_up, round_up
from chainmerge.engines.qemu.granules import may_detect_zeroes
from chainmerge.planning.space.arrivals import Arrivals, l1_entries
from chainmerge.planning.space.clusters import HostLayout, place_clusters, release
from chainmerge.qcow2.bitmaps import TABLE_ENTRY_SIZE, directory_entry_size
from chainmerge.qcow2.bits import BitSet, packed_size
from chainmerge.qcow2.header import L1_ENTRY_BYTES, SECTOR, Header
from chainmerge.qcow2.runs import Runs


class BitmapShape(Struct, frozen=True):
    """What a bitmap takes, apart from the size of the disk.

    Attributes:
        name_bytes: Length of its name as stored.
        granularity: Bytes of the guest's disk a bit.
        data_clusters: Clusters of bits that its table points to.
    """

    name_bytes: int
    granularity: int
    data_clusters: int = 0


def shape_of_kept(
    name: str, granularity: int, bits: BitSet | None, disk_size: int, cluster_size: int
) -> BitmapShape:
    """What a bitmap takes that is kept.

    *bits* is None where the guest may write anywhere until it is stored. Sizes are in bytes.
    """
    if bits is None:
        clusters = divide_up(packed_size(disk_size, granularity), cluster_size)
    else:
        clusters = len(bits.dirty_parts(cluster_size))
    return BitmapShape(_length_of(name), granularity, clusters)


def shape_of_tombstone(name: str, granularity: int) -> BitmapShape:
    """What a tombstone takes; *granularity* is in bytes."""
    return BitmapShape(_length_of(name), granularity)


def _length_of(name: str) -> int:
    return len(name.encode("utf-8", "surrogateescape"))


class MergeDemand(Struct, frozen=True):
    """All that decides how much space a merge into a qcow2 base takes.

    Attributes:
        header: Base's.
        layout: Base's file as it is, clusters that are leaked counted as free.
        old_bitmaps: Clusters that base's present bitmaps take and pruning will free.
        prunes: Whether base's bitmaps are replaced by the stand-ins before the copy; False if
            the stand-ins are what base has already.
        stand_ins: The bitmaps that base has during the copy, all without bits.
        final_bitmaps: The bitmaps that base has after it.
        arrivals: What the data that moves allocates.
        virtual_size_after: Bytes of the guest's disk after the merge.
    """

    header: Header
    layout: HostLayout
    old_bitmaps: Runs
    prunes: bool
    stand_ins: Sequence[BitmapShape]
    final_bitmaps: Sequence[BitmapShape]
    arrivals: Arrivals
    virtual_size_after: int


class SpaceNeed(Struct, frozen=True):
    """How large base's file or volume must be. All in bytes.

    Attributes:
        image_end: End of the last cluster in use today.
        prune: What base must be before its bitmaps are replaced.
        required: What base must be for the whole merge: never too small.
        optimal: What base would take after the merge without any gaps; a lower estimate.
        breakdown: What *required* consists of; the values add up to it.
    """

    image_end: int
    prune: int
    required: int
    optimal: int
    breakdown: Mapping[str, int]


def raw_space_need(size: int, virtual_size_after: int) -> SpaceNeed:
    """The need of a raw base of *size* bytes: the guest's disk, byte for byte."""
    after = max(size, round_up(virtual_size_after, SECTOR))
    return SpaceNeed(size, size, after, after, {"used": size, "data": after - size})


def space_need(demand: MergeDemand) -> SpaceNeed:
    """Work out how large base must be for a merge by QEMU."""
    header, arrivals = demand.header, demand.arrivals
    pruned, prune_end = _prune(demand)
    l1_clusters = _l1_growth(header, demand.virtual_size_after)
    rewritten = _pieces(header, demand.virtual_size_after, demand.stand_ins)
    final = _pieces(header, demand.virtual_size_after, demand.final_bitmaps)
    copy = _Requests(
        arrivals.clusters + arrivals.l2_tables + l1_clusters,
        max(arrivals.largest, l1_clusters),
        _appended(header, arrivals, pruned.end),
    )
    close = _Requests(sum(rewritten), max(rewritten, default=1))
    final_data = sum(bitmap.data_clusters for bitmap in demand.final_bitmaps)
    store = _Requests(sum(final) + final_data, max(final, default=1))
    bound = _bound(pruned, header, (copy, close, store))
    required = max(prune_end, bound.end, demand.layout.end)
    parts = {
        "used": pruned.used,
        "data": arrivals.likely_clusters,
        "zeros as data": arrivals.clusters - arrivals.likely_clusters,
        "L2 tables": arrivals.l2_tables,
        "L1 table": l1_clusters,
        "refcounts": bound.refcount_clusters,
        "bitmaps during the copy": close.clusters,
        "bitmaps": store.clusters,
    }
    parts["gaps"] = max(0, required - sum(parts.values()))
    optimal = pruned.used + sum(parts[part] for part in ("data", "L2 tables", "bitmaps"))
    cluster_size = header.cluster_size
    return SpaceNeed(
        image_end=demand.layout.end * cluster_size,
        prune=prune_end * cluster_size,
        required=required * cluster_size,
        optimal=min(optimal, required) * cluster_size,
        breakdown={part: count * cluster_size for part, count in parts.items() if count},
    )


def _prune(demand: MergeDemand) -> tuple[HostLayout, int]:
    """Base's file after the stand-ins have replaced the old bitmaps, and its largest end."""
    layout = demand.layout
    if not demand.prunes:
        return layout, layout.end
    pieces = _pieces(demand.header, demand.header.virtual_size, demand.stand_ins)
    beside, first = place_clusters(layout, pieces, 0)
    layout = release(beside, demand.old_bitmaps)
    if not pieces:
        return layout, beside.end
    lower, _ = place_clusters(layout, pieces, 0)
    return release(lower, first), max(beside.end, lower.end)


def _pieces(header: Header, virtual_size: int, bitmaps: Sequence[BitmapShape]) -> list[int]:
    """Clusters of each bitmap's table, and of the directory of them all."""
    if not bitmaps:
        return []
    cluster_size = header.cluster_size
    tables = [
        _clusters(
            _clusters(packed_size(virtual_size, bitmap.granularity), cluster_size)
            * TABLE_ENTRY_SIZE,
            cluster_size,
        )
        for bitmap in bitmaps
    ]
    directory = sum(directory_entry_size(bitmap.name_bytes, 0) for bitmap in bitmaps)
    return [*(table for table in tables if table), _clusters(directory, cluster_size)]


def _l1_growth(header: Header, virtual_size: int) -> int:
    """Clusters of the longer L1 table that a larger disk takes; 0 if the present one will do."""
    entries = l1_entries(header, virtual_size)
    if entries <= header.l1_size:
        return 0
    return _clusters(entries * L1_ENTRY_BYTES, header.cluster_size)


def _appended(header: Header, arrivals: Arrivals, end: int) -> int:
    """Clusters that may go behind the end in continuation of a cluster written in place."""
    if may_detect_zeroes(header.cluster_size):
        return arrivals.largest - 1 if arrivals.overwritten_end else 0
    # The next request begins in the middle of the cluster with which this one ended, so there
    # is no end to it.
    return arrivals.clusters if arrivals.overwritten_end >= end else 0


class _Requests(Struct, frozen=True):
    """What a step asks for.

    Attributes:
        clusters: How many clusters.
        largest: How many of them at once at most.
        appended: How many of them may go behind the file's end though there is room below.
    """

    clusters: int
    largest: int
    appended: int = 0


class _Bound(Struct, frozen=True):
    end: int
    refcount_clusters: int


def _bound(layout: HostLayout, header: Header, steps: Sequence[_Requests]) -> _Bound:
    """Where the file ends at most after the steps, refcounts included: a fixed point."""
    largest = max(step.largest for step in steps)
    before_store = layout.missing_blocks(_end(layout, steps[:-1], 0))
    entries = len(layout.blocks)
    areas = area_end = blocks = 0
    while True:
        # Each new area can make the run of free clusters before it end too early.
        gaps = (largest - 1) * (areas > 0)
        extra = blocks + areas
        if blocks > before_store:
            # Our own writer replaces the table where it cannot link a block into the old one.
            extra += header.refcount_table_clusters
        end = max(_end(layout, steps, extra + gaps), area_end)
        if divide_up(end, layout.per_block) > entries:
            area = _refcount_area(layout, entries, largest)
            entries, areas, area_end = area.entries, areas + area.clusters, area.end
        elif layout.missing_blocks(end) > blocks:
            blocks = layout.missing_blocks(end)
        else:
            return _Bound(end, extra)


def _end(layout: HostLayout, steps: Sequence[_Requests], extra: int) -> int:
    """Where the file ends at most, with *extra* single clusters among the first step's."""
    total, largest, appended, behind = extra, 1, 0, extra
    for step in steps:
        total += step.clusters
        appended += step.appended
        largest = max(largest, step.largest)
        # Either all steps together fill what is usable, or this one's all go behind the end.
        filling = max(appended, total - layout.usable(largest))
        behind = min(max(0, filling), behind + step.clusters)
    return layout.end + behind


class _Area(Struct, frozen=True):
    """A new refcount table as QEMU makes it, with the blocks that describe it."""

    end: int
    clusters: int
    entries: int


def _refcount_area(layout: HostLayout, entries: int, largest: int) -> _Area:
    """The area that QEMU makes when a cluster is needed that *entries* blocks do not describe.

    After ``alloc_refcount_block`` and ``qcow2_refcount_area``: it starts where the area
    described by the next block begins, counted from the highest cluster of the request.
    """
    per_block, per_table_cluster = layout.per_block, layout.per_table_cluster
    start = (entries + 1 + (largest + 2) // per_block) * per_block
    blocks = _blocks_for(start, per_block, per_table_cluster)
    table = _clusters((blocks + _clusters(blocks, 2)), per_table_cluster)
    new_blocks = blocks - start // per_block
    return _Area(start + new_blocks + table, new_blocks + table, table * per_table_cluster)


def _blocks_for(clusters: int, per_block: int, per_table_cluster: int) -> int:
    """Refcount blocks for *clusters* and for themselves and their table, which has some spare."""
    _, table = _refcounts_for(clusters, per_block, per_table_cluster)
    return _refcounts_for(clusters + _clusters(table, 2), per_block, per_table_cluster)[0]


def _refcounts_for(clusters: int, per_block: int, per_table_cluster: int) -> tuple[int, int]:
    blocks = table = 0
    while True:
        needed = _clusters(clusters + blocks + table, per_block)
        if needed == blocks and _clusters(needed, per_table_cluster) == table:
            return blocks, table
        blocks, table = needed, _clusters(needed, per_table_cluster)


def _clusters(amount: int, size: int) -> int:
    """How many pieces of *size* an amount takes."""
    return divide_up(amount, size)
