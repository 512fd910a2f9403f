# SPDX-License-Identifier: Apache-2.0
"""What base needs at most for a merge by QEMU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import replace

from chainmerge.arithmetic.distinct import distinct
from chainmerge.arithmetic.rounding import divide_up, round_up
from chainmerge.bitmaps.comparing import bitmap_difference
from chainmerge.bitmaps.sets import final_set, stand_ins
from chainmerge.chain.view import in_step
from chainmerge.engines.metadata.old_tree import bitmap_clusters
from chainmerge.options import Placement
from chainmerge.planning.space.arrivals import (
    Arrivals,
    BaseFacts,
    count_arrivals,
    qemu_growth_obstacle,
)
from chainmerge.planning.space.clusters import HostLayout, layout_of
from chainmerge.planning.space.errors import CannotGrowBase, OldBytesBehindEnd
from chainmerge.planning.space.figures import SpaceSurvey, facts_of_need, without_figures
from chainmerge.planning.space.need import BitmapShape, MergeDemand, space_need
from chainmerge.planning.space.raw import missing_in_place
from chainmerge.qcow2.behind_end import old_bytes
from chainmerge.qcow2.lookup import lookup
from chainmerge.qcow2.mapping import Kind
from chainmerge.qcow2.refcounts import read_refcount_table, refcounts_per_block
from chainmerge.qcow2.runs import runs_of
from chainmerge.storage.file_space import NO_RANGES, ByteRanges, space_to_count, united
from chainmerge.storage.locks import AnyFile
from chainmerge.storage.volumes import open_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from chainmerge.bitmaps.gathering import BitmapFacts
    from chainmerge.chain.opening import OpenChain, OpenImage
    from chainmerge.chain.target import Target
    from chainmerge.engines.metadata.bitmap_set import StoredBitmap
    from chainmerge.planning.facts import SpaceFacts
    from chainmerge.qcow2.check import CheckReport
    from chainmerge.qcow2.image import Qcow2Image
    from chainmerge.qcow2.references import ReferenceCounts
    from chainmerge.storage.volume_errors import CannotGrow

_WINDOW = 1 << 20
_NOT_WRITTEN = frozenset({"used", "gaps"})
"""Parts of what an image needs that QEMU writes nothing to."""


def allocated_by_qemu(target: Target, opened: OpenChain, space: SpaceFacts) -> int | None:
    """What has to be given to a qcow2 base that QEMU commits to, at most.

    None of a block device that has all its space.
    """
    base = opened.images[target.base_index]
    if base.info.data_file is not None:
        return allocated_where_written(base, space, lambda: NO_RANGES)
    return allocated_where_written(base, space, lambda: _written_over(target, opened))


def allocated_where_written(
    written: OpenImage, space: SpaceFacts, over: Callable[[], ByteRanges]
) -> int | None:
    """What a file system, or the pool of a thin volume, has to give an image at most.

    Where QEMU finds free clusters in the file is not known, so any of its holes may be filled,
    but no more of them than there is to write.

    Args:
        written: the image that QEMU writes to.
        space: what it needs.
        over: where its file has clusters that are written over.
    """
    assert written.image is not None
    on_file = space_to_count(written.readable) if isinstance(written.readable, AnyFile) else None
    if on_file is None:
        return None
    size, cluster = written.info.file_size, written.image.header.cluster_size
    grows = max(space.required - size, 0)
    needed = sum(part for name, part in space.breakdown.items() if name not in _NOT_WRITTEN)
    # Each cluster can lie in a chunk of its own.
    new = divide_up(needed, cluster) * max(cluster, on_file.unit)
    missing = on_file.missing(over())
    return grows + min(size - on_file.own.before(size).total, new + missing)


def _written_over(target: Target, opened: OpenChain) -> ByteRanges:
    """Where base's file has clusters, or a place for them, that get data from above."""
    size = target.chain.top.virtual_size
    merged = opened.view(target.base_index + 1).resolve(0, size)
    base = opened.view(target.base_index, target.base_index + 1).resolve(0, size)
    places = []
    for upper, lower in in_step(merged, base):
        bounds = distinct(np.concatenate([upper.guest, lower.guest]))
        above, below = upper.cut_at(bounds), lower.cut_at(bounds)
        written = (above.kind == Kind.DATA) | (above.kind == Kind.COMPRESSED)
        written &= (below.kind == Kind.DATA) | (below.kind == Kind.ZERO_ALLOCATED)
        start = below.host[written].astype(np.int64)
        places.append((start, start + below.length[written].astype(np.int64)))
    return united(places)


def survey_for_qemu(
    target: Target,
    opened: OpenChain,
    bitmaps: BitmapFacts,
    report: CheckReport,
    references: ReferenceCounts,
) -> SpaceSurvey:
    image = opened.images[target.base_index].image
    assert image is not None
    layout = host_layout(image, references.counts)
    facts = BaseFacts(image.name, image.header, backing_size(target), layout.shared)
    top_size = target.chain.top.virtual_size
    obstacle = (
        qemu_growth_obstacle(facts, top_size)
        or end_obstacle(image, facts, top_size)
        or _old_bytes_obstacle(opened.images[target.base_index], facts, top_size)
        or _data_file_obstacle(target, opened)
    )
    if obstacle is not None:
        return without_figures(report, obstacle)
    arrivals = arrivals_in_base(target, opened, facts)
    size_after = max(image.header.virtual_size, top_size)
    need = space_need(_demand(image, layout, arrivals, bitmaps, size_after))
    space = replace(
        facts_of_need(need), new_clusters=arrivals.likely_clusters, new_l2_tables=arrivals.l2_tables
    )
    space = replace(space, allocates=allocated_by_qemu(target, opened, space))
    return SpaceSurvey({Placement.IN_PLACE: space}, {}, report, None)


def end_obstacle(image: Qcow2Image, facts: BaseFacts, top_size: int) -> CannotGrowBase | None:
    """Why the end of base's disk cannot be moved.

    QEMU hides what a longer backing file has behind the old end. Within base's last cluster it
    does so by zero subclusters, and a compressed cluster has none (QEMU 7.2: "Operation not
    supported").
    """
    header = image.header
    hidden_from = round_up(header.virtual_size, header.subcluster_size)
    if not facts.uncovers_backing(top_size) or hidden_from % header.cluster_size == 0:
        return None
    if lookup(image, header.virtual_size - 1).kind is not Kind.COMPRESSED:
        return None
    reason = (
        "its last cluster is compressed, it has extended L2 entries, and its backing file is longer"
    )
    return CannotGrowBase(image.name, top_size, reason)


def _old_bytes_obstacle(
    base: OpenImage, facts: BaseFacts, top_size: int
) -> OldBytesBehindEnd | None:
    """Why what base holds behind its end would show; None if it is zeros or can be wiped."""
    assert base.image is not None
    if facts.uncovers_backing(top_size):
        # QEMU hides that by zeros, what base itself holds there included.
        return None
    found = old_bytes(base.image, base.layer.source, top_size)
    if found.obstacle is None:
        return None
    return OldBytesBehindEnd(str(base.info.path), top_size, found.obstacle)


def _data_file_obstacle(target: Target, opened: OpenChain) -> CannotGrow | None:
    """Why the data does not fit into base's external data file; None if it does."""
    data_file = target.base.data_file
    if data_file is None:
        return None
    volume = open_volume(data_file).facts()
    return volume.refusal(volume.size, missing_in_place(target, opened, shares=False))


def backing_size(target: Target) -> int | None:
    if target.base_index == 0:
        return None
    return target.chain.images[target.base_index - 1].virtual_size


def host_layout(image: Qcow2Image, counts: npt.NDArray[np.unsignedinteger]) -> HostLayout:
    windows = (counts[at : at + _WINDOW] for at in range(0, len(counts), _WINDOW))
    return layout_of(
        windows,
        read_refcount_table(image) != 0,
        image.header.cluster_size,
        refcounts_per_block(image.header),
    )


def arrivals_in_base(target: Target, opened: OpenChain, facts: BaseFacts) -> Arrivals:
    base = opened.images[target.base_index]
    assert base.image is not None
    top_size = target.chain.top.virtual_size
    return count_arrivals(
        facts,
        base.image.l1,
        opened.view(target.base_index + 1).resolve(0, top_size),
        opened.view(target.base_index, target.base_index + 1).resolve(),
        top_size,
    )


def _demand(
    image: Qcow2Image,
    layout: HostLayout,
    arrivals: Arrivals,
    bitmaps: BitmapFacts,
    size_after: int,
) -> MergeDemand:
    header = image.header
    holds = header.version >= 3
    between = stand_ins(bitmaps, header.virtual_size) if holds else ()
    after = final_set(bitmaps, size_after) if holds else ()
    return MergeDemand(
        header=header,
        layout=layout,
        old_bitmaps=runs_of(distinct(bitmap_clusters(image))),
        prunes=holds and bitmap_difference(image, between) is not None,
        stand_ins=tuple(_shapes(between, header.cluster_size)),
        final_bitmaps=tuple(_shapes(after, header.cluster_size)),
        arrivals=arrivals,
        virtual_size_after=size_after,
    )


def _shapes(bitmaps: Sequence[StoredBitmap], cluster_size: int) -> Iterator[BitmapShape]:
    for bitmap in bitmaps:
        yield BitmapShape(
            name_bytes=len(bitmap.name.encode("utf-8", "surrogateescape")),
            granularity=bitmap.bits.granularity,
            data_clusters=len(bitmap.bits.dirty_parts(cluster_size)),
        )
