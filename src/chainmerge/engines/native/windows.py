# SPDX-License-Identifier: Apache-2.0
"""Walks through what the images above base define, in windows of whole L2 tables of base."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chainmerge.arithmetic.distinct import distinct
from chainmerge.arithmetic.rounding import divide_up
from chainmerge.chain.view import NO_LAYER, Resolved, joined_resolved
from chainmerge.engines.native.decisions import OldEntries, touched_clusters
from chainmerge.options import Direction
from chainmerge.qcow2.extents import Extents, Kind
from chainmerge.qcow2.gather import read_pieces
from chainmerge.qcow2.mapping import OFFSET_MASK

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.arithmetic.arrays import I64Array, U64Array
    from chainmerge.chain.view import GuestView
    from chainmerge.engines.native.decisions import MappedDisk
    from chainmerge.qcow2.header import Header
    from chainmerge.qcow2.image import Qcow2Image
    from chainmerge.qcow2.runs import Clusters

# Arrays of a word for each stay in the caches, and below the size from which every one of them
# would be new pages from the kernel.
_CLUSTERS_AT_ONCE = 1 << 15
_WORD = 8


def window_bytes(header: Header) -> int:
    """Guest bytes of one window: as many whole L2 tables as make about 32 Ki clusters."""
    tables = max(1, _CLUSTERS_AT_ONCE // header.l2_entries)
    return tables * header.l2_entries * header.cluster_size


def changed_windows(above: GuestView, disk: MappedDisk) -> Iterator[Resolved]:
    """What the images above base say, in windows in which they say anything.

    Covers a window from its first byte to its end or that of the disk. In a commit, what lies
    behind the old end of base's disk and is open above is zeros: no longer backing file may show
    there. Behind the end of a top that is smaller than base everything is open.
    """
    parts = _resolved(above, disk)
    return (window for window in _cut(parts, window_bytes(disk.header)) if _says_anything(window))


def tables_in(disk: MappedDisk, window: Resolved) -> I64Array:
    """L1 indexes of the tables of base that map a window."""
    table_bytes = disk.header.l2_entries * disk.header.cluster_size
    return np.arange(
        window.start // table_bytes, divide_up(window.end, table_bytes), dtype=np.int64
    )


def read_old_entries(image: Qcow2Image, window: Resolved) -> OldEntries:
    """Base's L2 entries of the clusters of which a window says anything."""
    header = image.header
    clusters = touched_clusters(header, window)
    table, within = np.divmod(clusters, header.l2_entries)
    tables = distinct(table)
    words = read_tables(image, tables)
    row = np.searchsorted(tables, table)
    if not header.extended_l2:
        return OldEntries(clusters, words[row, within], None)
    return OldEntries(clusters, words[row, 2 * within], words[row, 2 * within + 1])


def read_tables(image: Qcow2Image, indexes: Clusters) -> U64Array:
    """L2 tables by their L1 index, zeros if there is none: uint64[n, words of a cluster]."""
    header = image.header
    words = np.zeros((len(indexes), header.cluster_size // _WORD), dtype=np.uint64)
    offsets = table_offsets(image, indexes)
    present = np.flatnonzero(offsets)
    if len(present):
        data = read_pieces(image.readable, offsets[present], header.cluster_size)
        words[present] = np.frombuffer(data, ">u8").reshape(len(present), -1)
    return words


def table_offsets(image: Qcow2Image, indexes: Clusters) -> U64Array:
    """File offsets of L2 tables by their L1 index, 0 if there is none: uint64[n]."""
    offsets: U64Array = l2_entries_of(image, indexes) & np.uint64(OFFSET_MASK)
    return offsets


def l2_entries_of(image: Qcow2Image, indexes: Clusters) -> U64Array:
    """L1 entries as they are stored, 0 behind the end of the table: uint64[n]."""
    entries = np.zeros(len(indexes), dtype=np.uint64)
    inside = indexes < len(image.l1)
    entries[inside] = image.l1[indexes[inside]]
    return entries


def _resolved(above: GuestView, disk: MappedDisk) -> Iterator[Resolved]:
    if disk.direction is Direction.PULL:
        # Behind the end of a lower image that is smaller there are zeros, and no other image
        # may show through them.
        yield from above.resolve(0, disk.size_after)
        return
    base_end = disk.header.virtual_size
    for part in above.resolve(0, above.virtual_size):
        yield _closed_behind(part, base_end)
    if above.virtual_size < disk.size_after:
        rest = Extents.single(above.virtual_size, disk.size_after, Kind.UNALLOCATED)
        yield Resolved(rest, np.array([NO_LAYER], dtype=np.int32))


def _closed_behind(part: Resolved, base_end: int) -> Resolved:
    """The same with zeros for what is open behind the old end of base's disk."""
    if part.end <= base_end:
        return part
    if part.start < base_end:
        bounds = distinct(np.append(part.guest, np.uint64(base_end)))
        part = part.cut_at(bounds)
    extents = part.extents
    behind = (extents.guest >= np.uint64(base_end)) & (extents.kind == Kind.UNALLOCATED)
    kind = np.where(behind, np.uint8(Kind.ZERO), extents.kind)
    closed = Extents(extents.guest, extents.length, kind, extents.host, extents.csize)
    return Resolved(closed, part.layer)


def _cut(parts: Iterator[Resolved], span: int) -> Iterator[Resolved]:
    """The parts, joined, and cut at multiples of *span*; long open ranges are left out."""
    at = 0
    held: list[Resolved] = []
    for whole in parts:
        part = whole
        while part.end >= at + span:
            held.append(part.clipped(max(part.start, at), at + span))
            yield joined_resolved(held)
            held = []
            at += span
            at += _open_at(part, at) // span * span
            if part.end <= at:
                break
            part = part.clipped(at, part.end)
        else:
            held.append(part)
    if held:
        yield joined_resolved(held)


def _open_at(part: Resolved, at: int) -> int:
    """How many bytes from *at* on are open without a break."""
    if part.end <= at:
        return 0
    index = int(np.searchsorted(part.guest, np.uint64(at), "right")) - 1
    if part.kind[index] != Kind.UNALLOCATED:
        return 0
    return int(part.guest[index] + part.length[index]) - at


def _says_anything(window: Resolved) -> bool:
    return bool((window.kind != Kind.UNALLOCATED).any())
