# SPDX-License-Identifier: Apache-2.0
"""Replacing all bitmaps of an image by another set, in one switch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from chainmerge.engines.metadata.allocation import Allocation, Clusters, Runs, allocate, runs_of
from chainmerge.engines.metadata.bitmap_set import PlacedBitmapSet, StoredBitmap, lay_out, place
from chainmerge.engines.metadata.header import HeaderWrite, compose_header, content_of
from chainmerge.engines.metadata.old_tree import (
    bitmap_clusters,
    refcount_table_clusters,
    used_once,
)
from chainmerge.engines.metadata.preconditions import require_sound
from chainmerge.engines.metadata.refcount_blocks import Write, pack_refcounts, refcount_writes
from chainmerge.engines.metadata.steps import Port, Step, StepName, execute, reserve
from chainmerge.engines.metadata.writes import Piece, gathered, whole_clusters
from chainmerge.qcow2.header import SECTOR
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.refcounts import U64Array, read_refcount_table, refcounts_per_block

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_TABLE_ENTRY_BYTES = 8
_NONE: Clusters = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class MetadataRewrite:
    """A rewrite that is decided down to the cluster.

    Attributes:
        image: What messages call the image.
        required_size: How many bytes the file must have for the new clusters; 0 for none.
        allocated: The new clusters.
        released: Clusters that only the old metadata uses, ascending.
        cluster_size: Bytes.
        steps: The writes by step, each followed by a flush; none where nothing changes.
    """

    image: str
    required_size: int
    allocated: Runs
    released: Clusters
    cluster_size: int
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class RewriteOutcome:
    """What a rewrite did.

    Attributes:
        required_size: Bytes that the file had to have for it.
        written: Bytes written.
        freed: File ranges (offset, length in bytes) that hold nothing any more.
    """

    required_size: int
    written: int
    freed: tuple[tuple[int, int], ...]


def plan_bitmap_set(image: Qcow2Image, bitmaps: Sequence[StoredBitmap]) -> MetadataRewrite:
    """Decide how to make *bitmaps* the bitmaps of *image*, all of them and no others.

    Reads refcounts and the old bitmaps' tables, writes nothing. The image must have no
    corruptions: free clusters are told from its stored refcounts.

    Raises:
        BitmapSetUnfit: the image cannot hold this set.
        HeaderFull: one sector write cannot switch to it.
        RefcountTableFull: the clusters that it takes cannot be counted.
    """
    return _planned(image, bitmaps, bitmap_clusters(image))


def replace_bitmaps(port: Port, bitmaps: Sequence[StoredBitmap]) -> RewriteOutcome:
    """Make *bitmaps* the bitmaps of a closed image, all of them and no others.

    At any instant the image has entirely the old set or entirely the new one. What the
    old set used is free afterwards, unless the old set was broken: then it is leaked.

    Raises:
        ImageDirty, ImageCorrupt, ImageDamaged: the image must be repaired first.
        BitmapSetUnfit, HeaderFull, RefcountTableFull: the image cannot hold this set.
        NotEnoughSpace: there is no room for it beside the old one.
        RewriteFailed: nothing changed but for leaked clusters.
        SwitchUnknown: the image has the old set or the new one.
        ReleaseFailed: the image has the new set, and leaked clusters.
    """
    image = Qcow2Image(port)
    bitmaps_sound = require_sound(image)
    # Of bitmaps that contradict the refcounts nothing is known to be theirs alone.
    old = bitmap_clusters(image) if bitmaps_sound else _NONE
    rewrite = _planned(image, bitmaps, old)
    reserve(port, rewrite.required_size, _ranges(rewrite.allocated, rewrite.cluster_size))
    written = execute(port, rewrite.steps)
    freed = _ranges(runs_of(rewrite.released), rewrite.cluster_size)
    return RewriteOutcome(rewrite.required_size, written, freed)


def _ranges(runs: Runs, cluster_size: int) -> tuple[tuple[int, int], ...]:
    return tuple(
        (start * cluster_size, length * cluster_size)
        for start, length in zip(runs.start.tolist(), runs.length.tolist(), strict=True)
    )


def _planned(
    image: Qcow2Image, bitmaps: Sequence[StoredBitmap], old_bitmaps: Clusters
) -> MetadataRewrite:
    header = image.header
    layout = lay_out(image.name, header, bitmaps)
    if not bitmaps and header.bitmaps is None and not header.bitmaps_trusted:
        return MetadataRewrite(image.name, 0, runs_of(_NONE), _NONE, header.cluster_size, ())
    allocation = allocate(image, layout.demand)
    placed = place(layout, allocation)
    head = _header_write(image, placed, allocation)
    old_table = _NONE if allocation.table_start is None else refcount_table_clusters(image)
    released = used_once(image, np.sort(np.concatenate([old_bitmaps, old_table])))
    return MetadataRewrite(
        image=image.name,
        required_size=allocation.end * header.cluster_size,
        allocated=runs_of(allocation.everything),
        released=released,
        cluster_size=header.cluster_size,
        steps=tuple(_steps(image, placed, allocation, head, released)),
    )


def _header_write(
    image: Qcow2Image, placed: PlacedBitmapSet, allocation: Allocation
) -> HeaderWrite:
    header = image.header
    content = replace(
        content_of(header),
        bitmaps=placed.extension,
        bitmaps_trusted=placed.extension is not None,
    )
    if allocation.table_start is not None:
        content = replace(
            content,
            refcount_table_offset=allocation.table_start * header.cluster_size,
            refcount_table_clusters=allocation.table_clusters,
        )
    cluster = image.readable.read(0, header.cluster_size)
    return compose_header(image.name, cluster, header, content)


def _steps(
    image: Qcow2Image,
    placed: PlacedBitmapSet,
    allocation: Allocation,
    head: HeaderWrite,
    released: Clusters,
) -> Iterator[Step]:
    header, readable = image.header, image.readable
    table = read_refcount_table(image)
    counted = allocation.everything
    described = ~np.isin(counted // refcounts_per_block(header), allocation.blocks.index)
    raised = counted[described]
    ones = np.ones(len(raised), dtype=np.uint64)
    zeros = np.zeros(len(released), dtype=np.uint64)

    def fill() -> Iterator[Write]:
        yield from gathered(_new_clusters(image, placed, allocation, table), header.cluster_size)
        yield from head.beyond

    def count() -> Iterator[Write]:
        return refcount_writes(readable, header, table, raised, ones)

    def link() -> Iterator[Write]:
        return _table_writes(image, allocation)

    def release() -> Iterator[Write]:
        return refcount_writes(readable, header, table, released, zeros)

    yield Step(StepName.FILL, fill)
    if len(raised):
        yield Step(StepName.COUNT, count)
    if len(allocation.blocks.index) and allocation.table_start is None:
        yield Step(StepName.LINK, link)
    yield Step(StepName.SWITCH, lambda: [(0, head.sector)])
    if len(released):
        yield Step(StepName.RELEASE, release)


def _new_clusters(
    image: Qcow2Image, placed: PlacedBitmapSet, allocation: Allocation, table: U64Array
) -> Iterator[Piece]:
    yield from placed.pieces()
    yield from _new_blocks(image, allocation)
    if allocation.table_start is not None:
        yield _new_table(image, allocation, table, allocation.table_start)


def _new_blocks(image: Qcow2Image, allocation: Allocation) -> Iterator[Piece]:
    """The new refcount blocks, each counting the new clusters in its range."""
    header = image.header
    entries = refcounts_per_block(header)
    blocks = allocation.blocks
    for index, cluster in zip(blocks.index.tolist(), blocks.cluster.tolist(), strict=True):
        within = allocation.everything - index * entries
        refcounts = np.zeros(entries, dtype=np.uint64)
        refcounts[within[(within >= 0) & (within < entries)]] = 1
        data = pack_refcounts(refcounts, header.refcount_order)
        yield np.array([cluster]), whole_clusters(data, header.cluster_size)


def _new_table(image: Qcow2Image, allocation: Allocation, table: U64Array, start: int) -> Piece:
    """The refcount table that replaces the old one: the same blocks and the new ones."""
    cluster_size = image.header.cluster_size
    size = allocation.table_clusters * cluster_size
    longer = np.zeros(size // _TABLE_ENTRY_BYTES, dtype=">u8")
    longer[: len(table)] = table
    longer[allocation.blocks.index] = allocation.blocks.cluster * cluster_size
    clusters = np.arange(start, start + allocation.table_clusters, dtype=np.int64)
    return clusters, whole_clusters(longer.tobytes(), cluster_size)


def _table_writes(image: Qcow2Image, allocation: Allocation) -> Iterator[Write]:
    """Writes that enter new blocks into the refcount table there is, sector by sector."""
    header = image.header
    per_sector = SECTOR // _TABLE_ENTRY_BYTES
    blocks = allocation.blocks
    for sector in np.unique(blocks.index // per_sector).tolist():
        offset = header.refcount_table_offset + sector * SECTOR
        entries = np.frombuffer(image.readable.read(offset, SECTOR), dtype=">u8").copy()
        here = blocks.index // per_sector == sector
        entries[blocks.index[here] % per_sector] = blocks.cluster[here] * header.cluster_size
        yield offset, entries.tobytes()
