# SPDX-License-Identifier: Apache-2.0
"""What a merge makes of each cluster of an image: pure, one window of clusters at a time.

The image that is written is base in a commit and top in a pull. The images that are merged
into it define parts of the guest's disk as data or as zeros and leave the rest *open*. It maps
the disk in *units*: clusters, or subclusters where its L2 entries are extended. A unit of
which the others define

- any byte as data becomes data. What they leave open of it is composed from what there is,
- every byte as zeros becomes zeros,
- a part as zeros and leave the rest open becomes data, unless there are zeros there too,
- nothing stays what it is.

In a commit that goes for all units, as what is above overrides what base has. In a pull it
goes for those that top itself leaves open.

A cluster whose units change is written to a *fresh* host cluster, unless its present one can
be *reused*: where no live byte of it is overwritten, or where data may be written in place.
A host cluster that a snapshot shares is never written to.

Units of a cluster are the bits of a ``uint32``: bit *i* is unit *i*, and without subclusters
bit 0 is the cluster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.arrays import BoolArray, U32Array, U64Array
from chainmerge.arithmetic.rounding import divide_up
from chainmerge.options import Direction, Placement
from chainmerge.qcow2.extents import Kind
from chainmerge.qcow2.header import Header
from chainmerge.qcow2.mapping import COMPRESSED, COPIED, OFFSET_MASK, ZERO_FLAG
from chainmerge.qcow2.runs import Clusters, Runs

if TYPE_CHECKING:
    from chainmerge.chain.view import Resolved

_ALL_SUBCLUSTERS = np.uint32(0xFFFF_FFFF)
_LOW_WORD = np.uint64(0xFFFF_FFFF)
_HIGH_WORD = np.uint64(32)
_NO_UNITS = np.uint32(0)


class MappedDisk(Struct, frozen=True):
    """What decides how a merge changes an image's mapping. Sizes in bytes.

    Attributes:
        header: The image's.
        size_after: Of the guest's disk after the merge, not below what it is now.
        backing_end: From here on nothing below the result shows, whatever it leaves open.
        direction: Whether what is merged overrides what the image has (commit), or fills in
            what it leaves open (pull).
    """

    header: Header
    size_after: int
    backing_end: int
    direction: Direction

    @property
    def full(self) -> np.uint32:
        """The mask of all units of a cluster."""
        return _ALL_SUBCLUSTERS if self.header.extended_l2 else np.uint32(1)

    @property
    def clusters_after(self) -> int:
        """Guest clusters after the merge."""
        return divide_up(self.size_after, self.header.cluster_size)


class OldEntries(Struct, frozen=True):
    """L2 entries of base as they are stored.

    Attributes:
        cluster: Whose they are: guest clusters, ascending.
        entries: Descriptors, 0 where there is no table: uint64[n].
        subclusters: Their subcluster bitmaps, None without extended entries: uint64[n].
    """

    cluster: Clusters
    entries: U64Array
    subclusters: U64Array | None


class Change(Struct, frozen=True):
    """The clusters of a window whose content or entry changes: arrays of equal length.

    Attributes:
        cluster: Guest clusters, ascending.
        entry: Their descriptors as stored.
        copied: Units whose bytes are written, carried ones included.
        data: Units that hold data afterwards.
        zero: Units that read as zeros afterwards.
        fresh: Whether the cluster needs a new host cluster.
        reused: Whether it keeps the one that it has.
        released: Whether it gives up what it has.
        remapped: Whether its L2 entry changes.
    """

    cluster: Clusters
    entry: U64Array
    copied: U32Array
    data: U32Array
    zero: U32Array
    fresh: BoolArray
    reused: BoolArray
    released: BoolArray
    remapped: BoolArray

    def __len__(self) -> int:
        """Return the number of clusters."""
        return len(self.cluster)


class WantedClusters(Struct, frozen=True):
    """The same before it is decided where the data goes: one element for each changed cluster.

    Attributes:
        cluster: Guest clusters, ascending.
        entry: Their descriptors as stored.
        old_data: Units of base that hold data (all of a compressed cluster).
        old_zero: Units of base that read as zeros.
        written: Units that get data from above.
        data: Units that hold data afterwards.
        zero: Units that read as zeros afterwards.
    """

    cluster: Clusters
    entry: U64Array
    old_data: U32Array
    old_zero: U32Array
    written: U32Array
    data: U32Array
    zero: U32Array


def touched_clusters(header: Header, above: Resolved) -> Clusters:
    """Guest clusters of which the merged images define any byte, ascending: no other changes.

    Args:
        header: Of the image that is written.
        above: What the images that are merged into it say; open where they say nothing.
    """
    says = above.kind != Kind.UNALLOCATED
    start = above.guest[says].astype(np.int64)
    end = divide_up(start + above.length[says].astype(np.int64), header.cluster_size)
    first = start // header.cluster_size
    # Neighbours can share a cluster.
    first[1:] = np.maximum(first[1:], end[:-1])
    some = first < end
    return Runs(first[some], (end - first)[some]).expanded()


def find_wanted(disk: MappedDisk, old: OldEntries, above: Resolved) -> WantedClusters:
    """What the merge wants of a window of an image.

    Args:
        disk: The image.
        old: Its entries, of the clusters that *above* touches.
        above: What the images that are merged into it say, from the window's first byte to its
            end or that of the disk; open where they say nothing.
    """
    wants_data, wants_zeros, leaves_open = _unit_flags(disk.header, old.cluster, above)
    old_data, old_zero = _old_units(disk, old)
    if disk.direction is Direction.PULL:
        undecided = ~(old_data | old_zero)
        wants_data, wants_zeros = wants_data & undecided, wants_zeros & undecided
    unit_starts_bare = _bare_units(disk, old.cluster)
    reads_as_zeros = old_zero | (unit_starts_bare & ~old_data)
    partly_zero = wants_zeros & leaves_open & ~wants_data
    written: U32Array = wants_data | (partly_zero & ~reads_as_zeros)
    zeroed: U32Array = wants_zeros & ~wants_data & ~leaves_open & ~reads_as_zeros
    zero_after = (old_zero & ~written) | zeroed
    if disk.header.version < 3:
        # No zero clusters: what nothing below shows through is dropped, the rest is written.
        written |= zeroed & ~unit_starts_bare
        zero_after = np.zeros_like(zeroed)
    data_after = old_data & ~zeroed | written
    changed = np.flatnonzero(written | zeroed)
    return WantedClusters(
        cluster=old.cluster[changed],
        entry=old.entries[changed],
        old_data=old_data[changed],
        old_zero=old_zero[changed],
        written=written[changed],
        data=data_after[changed],
        zero=zero_after[changed],
    )


def place_data(wanted: WantedClusters, disk: MappedDisk, placement: Placement) -> Change:
    """Decide for each cluster whether it keeps its host cluster."""
    entry = wanted.entry
    compressed = entry & np.uint64(COMPRESSED) != 0
    has_host = ~compressed & (entry & np.uint64(OFFSET_MASK) != 0)
    alone = entry & np.uint64(COPIED) != 0
    harmless = wanted.written & wanted.old_data == 0
    if placement is Placement.IN_PLACE:
        harmless[:] = True
    has_data = wanted.data != 0
    # Units that become zeros change only the entry, so that even a shared cluster stays.
    reused = has_host & has_data & ((wanted.written == 0) | (alone & harmless))
    # What lay behind the old end of the disk is nobody's data.
    reused &= wanted.cluster < disk.header.clusters
    fresh = has_data & ~reused
    same = reused & (wanted.data == wanted.old_data) & (wanted.zero == wanted.old_zero)
    return Change(
        cluster=wanted.cluster,
        entry=entry,
        copied=np.where(fresh, wanted.data, wanted.written),
        data=wanted.data,
        zero=wanted.zero,
        fresh=fresh,
        reused=reused,
        released=(has_host | compressed) & ~reused,
        remapped=~same,
    )


def new_entries(change: Change, hosts: U64Array, header: Header) -> tuple[U64Array, U64Array]:
    """The L2 descriptors and subcluster bitmaps (0 without extended entries) of a change.

    Args:
        change: The clusters.
        hosts: File offset of each one's host cluster, as after the merge; 0 for none.
        header: Base's.
    """
    alone = change.fresh | (change.reused & (change.entry & np.uint64(COPIED) != 0))
    entries = hosts | np.where(alone, np.uint64(COPIED), np.uint64(0))
    if not header.extended_l2:
        zero = np.where(change.zero != 0, np.uint64(ZERO_FLAG), np.uint64(0))
        return entries | zero, np.zeros_like(entries)
    zeros = change.zero.astype(np.uint64) << _HIGH_WORD
    return entries, zeros | change.data.astype(np.uint64)


def old_hosts(change: Change) -> U64Array:
    """File offsets of the host clusters that are reused, 0 for the others."""
    return np.where(change.reused, change.entry & np.uint64(OFFSET_MASK), np.uint64(0))


def _unit_flags(
    header: Header, cluster: Clusters, above: Resolved
) -> tuple[U32Array, U32Array, U32Array]:
    """Units of which some bytes are data above, zeros above, or open."""
    unit = header.subcluster_size
    start = above.guest.astype(np.int64)
    first = _units_below(header, cluster, start // unit)
    end = divide_up(start + above.length.astype(np.int64), unit)
    end = _units_below(header, cluster, end)
    count = len(cluster) * header.subclusters_per_cluster

    def masks(chosen: BoolArray) -> U32Array:
        return _as_masks(_marked(first[chosen], end[chosen], count), header)

    data = (above.kind == Kind.DATA) | (above.kind == Kind.COMPRESSED)
    is_open = above.kind == Kind.UNALLOCATED
    return masks(data), masks(~data & ~is_open), masks(is_open)


def _units_below(header: Header, cluster: Clusters, unit: Clusters) -> Clusters:
    """How many units of these clusters, which are ascending, lie below each unit of the disk."""
    each = header.subclusters_per_cluster
    whole = np.searchsorted(cluster, unit // each)
    is_within = np.append(cluster, -1)[whole] == unit // each
    below: Clusters = whole * each + np.where(is_within, unit % each, 0)
    return below


def _marked(first: Clusters, end: Clusters, count: int) -> BoolArray:
    """Which of *count* elements are in any of the ranges."""
    steps = np.bincount(first, minlength=count + 1) - np.bincount(end, minlength=count + 1)
    painted: BoolArray = np.cumsum(steps[:count]) > 0
    return painted


def _as_masks(flags: BoolArray, header: Header) -> U32Array:
    if not header.extended_l2:
        return flags.astype(np.uint32)
    octets = np.packbits(flags.reshape(-1, header.subclusters_per_cluster), 1, "little")
    return octets.view("<u4").astype(np.uint32).reshape(-1)


def _old_units(disk: MappedDisk, old: OldEntries) -> tuple[U32Array, U32Array]:
    """Units of base that hold data, and those that read as zeros."""
    compressed = old.entries & np.uint64(COMPRESSED) != 0
    if old.subclusters is None:
        zero = ~compressed & (old.entries & np.uint64(ZERO_FLAG) != 0)
        has_host = old.entries & np.uint64(OFFSET_MASK) != 0
        data, zeros = (compressed | (has_host & ~zero)).astype(np.uint32), zero.astype(np.uint32)
    else:
        data = (old.subclusters & _LOW_WORD).astype(np.uint32)
        zeros = (old.subclusters >> _HIGH_WORD).astype(np.uint32)
        data[compressed] = disk.full
    # Entries behind the old end of the disk are leftovers. They count as data, so that they
    # are replaced by what the larger disk shall have there.
    behind = int(np.searchsorted(old.cluster, disk.header.clusters))
    stale = old.entries[behind:] != 0
    if old.subclusters is not None:
        stale |= old.subclusters[behind:] != 0
    data[behind:] = np.where(stale, disk.full, _NO_UNITS)
    zeros[behind:] = 0
    return data, zeros


def _bare_units(disk: MappedDisk, cluster: Clusters) -> U32Array:
    """Units at which nothing below base shows."""
    header = disk.header
    each = header.subclusters_per_cluster
    first_bare = divide_up(disk.backing_end, header.subcluster_size)
    flags = cluster[:, np.newaxis] * each + np.arange(each) >= first_bare
    return _as_masks(flags.reshape(-1), header)
