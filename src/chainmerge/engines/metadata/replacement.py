# SPDX-License-Identifier: Apache-2.0
"""Replacing all bitmaps of an image by another set, in one switch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from chainmerge.engines.metadata.allocation import Allocation, allocate, stored_free_space
from chainmerge.engines.metadata.bitmap_set import (
    AnyBitmap,
    KeptBitmap,
    PlacedBitmapSet,
    StoredBitmap,
    lay_out,
    place_bitmap_set,
)
from chainmerge.engines.metadata.counting import (
    blocks_raised,
    link_writes,
    lowered_refcounts,
    new_refcount_blocks,
    new_refcount_table,
    raised_refcounts,
)
from chainmerge.engines.metadata.header import HeaderWrite, compose_header, content_of
from chainmerge.engines.metadata.old_tree import (
    bitmap_clusters,
    refcount_table_clusters,
    used_once,
)
from chainmerge.engines.metadata.preconditions import require_sound
from chainmerge.engines.metadata.steps import Port, Step, StepName, reserve, write_steps
from chainmerge.engines.metadata.writes import Piece, gathered
from chainmerge.qcow2.bitmaps import read_bits, read_directory
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.refcounts import read_refcount_table
from chainmerge.qcow2.runs import NO_CLUSTERS, Clusters, Runs, runs_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.arithmetic.arrays import U64Array
    from chainmerge.engines.metadata.refcount_blocks import Write


class MetadataRewrite(Struct, frozen=True):
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


class RewriteOutcome(Struct, frozen=True):
    """What a rewrite did.

    Attributes:
        required_size: Bytes that the file had to have for it.
        written: Bytes written.
        freed: File ranges (offset, length in bytes) that hold nothing any more.
    """

    required_size: int
    written: int
    freed: tuple[tuple[int, int], ...]


def plan_bitmap_set(image: Qcow2Image, bitmaps: Sequence[AnyBitmap]) -> MetadataRewrite:
    """Decide how to make *bitmaps* the bitmaps of *image*, all of them and no others.

    Reads refcounts and the old bitmaps' tables, writes nothing. The image must have no
    corruptions: free clusters are told from its stored refcounts.

    Raises:
        BitmapSetUnfit: the image cannot hold this set.
        HeaderFull: one sector write cannot switch to it.
        RefcountTableFull: the clusters that it takes cannot be counted.
    """
    return _planned(image, bitmaps, bitmap_clusters(image, names_kept(bitmaps)))


def names_kept(bitmaps: Sequence[AnyBitmap]) -> frozenset[str]:
    """Those of a set that stay in their clusters."""
    return frozenset(bitmap.name for bitmap in bitmaps if isinstance(bitmap, KeptBitmap))


def kept_where_unchanged(image: Qcow2Image, bitmaps: Sequence[StoredBitmap]) -> list[AnyBitmap]:
    """The same set, with what the image has already staying in its clusters.

    The image's bitmaps must be sound.
    """
    if not image.header.bitmaps_trusted:
        return list(bitmaps)
    entries = {entry.name: entry for entry in read_directory(image)}

    def as_it_is(bitmap: StoredBitmap) -> AnyBitmap:
        entry = entries.get(bitmap.name)
        if entry is None or entry.in_use or not entry.readable:
            return bitmap
        if entry.granularity != bitmap.granularity or entry.flags != bitmap.flags:
            return bitmap
        if bitmap.bits.disk_size != image.header.virtual_size:
            return bitmap
        return KeptBitmap(entry) if read_bits(image, entry) == bitmap.bits else bitmap

    return [as_it_is(bitmap) for bitmap in bitmaps]


def replace_bitmaps(port: Port, bitmaps: Sequence[AnyBitmap]) -> RewriteOutcome:
    """Make *bitmaps* the bitmaps of a closed image, all of them and no others.

    At any instant the image has entirely the old set or entirely the new one. What the
    old set used is free afterwards, unless the old set was broken: then it is leaked.

    Raises:
        ImageDirty, ImageCorrupt, ImageDamaged: the image must be repaired first.
        BitmapSetUnfit, HeaderFull, RefcountTableFull: the image cannot hold this set.
        NotEnoughSpace: there is no room for it beside the old one.
        RewriteFailed: nothing changed except for leaked clusters.
        SwitchUnknown: the image has the old set or the new one.
        ReleaseFailed: the image has the new set, and leaked clusters.
    """
    rewrite = _planned_safely(Qcow2Image(port), bitmaps)
    reserve(port, rewrite.required_size, ranges_of(rewrite.allocated, rewrite.cluster_size))
    written = write_steps(port, rewrite.steps)
    freed = ranges_of(runs_of(rewrite.released), rewrite.cluster_size)
    return RewriteOutcome(rewrite.required_size, written, freed)


def require_replaceable(image: Qcow2Image, bitmaps: Sequence[AnyBitmap]) -> None:
    """Make sure that :func:`replace_bitmaps` would not refuse this set, without a write.

    Whether a file system has room for it is not known before.

    Raises:
        ImageDirty, ImageCorrupt, ImageDamaged: the image must be repaired first.
        BitmapSetUnfit, HeaderFull, RefcountTableFull: the image cannot hold this set.
    """
    _planned_safely(image, bitmaps)


def _planned_safely(image: Qcow2Image, bitmaps: Sequence[AnyBitmap]) -> MetadataRewrite:
    bitmaps_sound = require_sound(image)
    if not bitmaps_sound:
        # Of bitmaps that contradict the refcounts nothing is known to be theirs alone.
        bitmaps = [_copied(image, bitmap) for bitmap in bitmaps]
    old = bitmap_clusters(image, names_kept(bitmaps)) if bitmaps_sound else NO_CLUSTERS
    return _planned(image, bitmaps, old)


def _copied(image: Qcow2Image, bitmap: AnyBitmap) -> StoredBitmap:
    if isinstance(bitmap, StoredBitmap):
        return bitmap
    return StoredBitmap(bitmap.name, read_bits(image, bitmap.entry), bitmap.flags)


def ranges_of(runs: Runs, cluster_size: int) -> tuple[tuple[int, int], ...]:
    """Runs of clusters as file ranges (offset, length in bytes)."""
    return tuple(
        (start * cluster_size, length * cluster_size)
        for start, length in zip(runs.start.tolist(), runs.length.tolist(), strict=True)
    )


def _planned(
    image: Qcow2Image, bitmaps: Sequence[AnyBitmap], old_bitmaps: Clusters
) -> MetadataRewrite:
    header = image.header
    layout = lay_out(image.name, header, bitmaps)
    if not bitmaps and header.bitmaps is None and not header.bitmaps_trusted:
        return MetadataRewrite(
            image.name, 0, runs_of(NO_CLUSTERS), NO_CLUSTERS, header.cluster_size, ()
        )
    allocation = allocate(stored_free_space(image), layout.demand)
    placed = place_bitmap_set(layout, allocation)
    head = _header_write(image, placed, allocation)
    old_table = NO_CLUSTERS if allocation.table_start is None else refcount_table_clusters(image)
    released = used_once(image, np.sort(np.concatenate([old_bitmaps, old_table])))
    return MetadataRewrite(
        image=image.name,
        required_size=allocation.end * header.cluster_size,
        allocated=allocation.everything,
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

    def fill() -> Iterator[Write]:
        yield from gathered(_new_clusters(image, placed, allocation, table), header.cluster_size)
        yield from head.beyond

    def count() -> Iterator[Write]:
        return raised_refcounts(readable, header, table, allocation)

    def link() -> Iterator[Write]:
        return link_writes(readable, header, allocation)

    def release() -> Iterator[Write]:
        return lowered_refcounts(readable, header, table, runs_of(released))

    yield Step(StepName.FILL, fill)
    if len(blocks_raised(header, allocation)):
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
    yield from new_refcount_blocks(image.header, allocation)
    if allocation.table_start is not None:
        yield new_refcount_table(image.header, table, allocation)
