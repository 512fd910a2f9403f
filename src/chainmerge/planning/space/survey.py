# SPDX-License-Identifier: Apache-2.0
"""Counts what base has and gets, for :mod:`chainmerge.space` to say how large it must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from chainmerge.bitmaps.sets import final_set, stand_ins
from chainmerge.chain.view import in_step
from chainmerge.engines.metadata.old_tree import bitmap_clusters
from chainmerge.engines.native import MappingNeed, ZeroRanges, data_ranges
from chainmerge.errors import ChainmergeError
from chainmerge.merging.verifying import bitmap_difference
from chainmerge.options import Direction, Placement
from chainmerge.planning.leaks import NO_LEAKS, Leaks, counted_as_used, find_leaks, leaked_before
from chainmerge.planning.plan import EngineName, SpaceFacts
from chainmerge.planning.space import native as native_facts
from chainmerge.planning.space.errors import CannotGrowBase, OldBytesBehindEnd
from chainmerge.qcow2.behind_end import old_bytes
from chainmerge.qcow2.check import CheckReport, check_with_references
from chainmerge.qcow2.extents import distinct
from chainmerge.qcow2.mapping import Kind, lookup
from chainmerge.qcow2.refcounts import read_refcount_table, refcounts_per_block
from chainmerge.space import (
    Arrivals,
    BaseFacts,
    BitmapShape,
    HostLayout,
    MergeDemand,
    Runs,
    SpaceNeed,
    count_arrivals,
    growth_obstacle,
    layout_of,
    raw_space_need,
    space_need,
)
from chainmerge.storage.file_space import ByteRanges, space_of, united
from chainmerge.storage.locks import AnyFile
from chainmerge.storage.volumes import open_volume

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainmerge.chain.target import BitmapFacts, OpenChain, OpenImage, Target
    from chainmerge.engines.metadata import SnapshotRemoval, StoredBitmap
    from chainmerge.options import MergeOptions
    from chainmerge.qcow2.image import Qcow2Image
    from chainmerge.qcow2.references import ReferenceCounts
    from chainmerge.storage.errors import CannotGrow

_WINDOW = 1 << 20


@dataclass(frozen=True, slots=True)
class SpaceSurvey:
    """What was found out about base's space.

    ``spaces`` has the ways in which the engine can place data, ``needs`` what the native
    engine is to be given for them. ``check`` is the consistency check of base, None for a raw
    one. The figures are only good if it is sound. ``leaks`` are the leaked clusters of what is
    written; those that stay count as used.
    """

    spaces: Mapping[Placement, SpaceFacts]
    needs: Mapping[Placement, MappingNeed]
    check: CheckReport | None
    obstacle: ChainmergeError | None
    leaks: Leaks = NO_LEAKS


def survey_space(
    target: Target,
    opened: OpenChain,
    bitmaps: BitmapFacts,
    engine: EngineName,
    direction: Direction,
    zeroes: ZeroRanges | None,
    removal: SnapshotRemoval | None,
    options: MergeOptions,
) -> SpaceSurvey:
    """Work out how large the result must be for the merge. Reads tables only.

    *removal* is what is done to it before that, if anything.
    """
    base = opened.images[target.result_index(direction)]
    size_after = max(base.info.virtual_size, target.chain.top.virtual_size)
    if base.image is None:
        shares = engine is EngineName.NATIVE and native_facts.shares_extents(
            opened, target.base_index, direction
        )
        return _raw_survey(target, opened, size_after, shares=shares)
    report, references = check_with_references(base.image)
    if not report.sound:
        return _without_figures(report, None)
    leaks = find_leaks(base.image, report, references, leaked_before(base.info.real_path))
    if options.reclaim:
        leaks = leaks.all_freed()
    references = counted_as_used(references, leaks.kept)
    if engine is EngineName.QEMU:
        survey = _survey_for_qemu(target, opened, bitmaps, report, references)
        return replace(survey, leaks=leaks)
    obstacle = native_facts.growth_obstacle(base.image, size_after)
    if obstacle is not None and direction is Direction.COMMIT:
        return _without_figures(report, obstacle)
    native = native_facts.survey_native(
        target, opened, bitmaps, references, direction, zeroes, removal
    )
    return SpaceSurvey(native.spaces, native.needs, report, None, leaks)


def survey_for_live(
    target: Target, opened: OpenChain, stale: frozenset[str], stored: Sequence[BitmapShape]
) -> SpaceSurvey:
    """Work out how large base must be for a copy by the QEMU of a running VM.

    That QEMU does all of it: it removes the stale bitmaps, and when base is closed it stores the
    others beside what they have taken so far. An upper bound for data that is on disk already;
    the guest can add to it.

    Args:
        target: the merge.
        opened: its images.
        stale: names of base's bitmaps that are removed.
        stored: the bitmaps that base has in the end.
    """
    base = opened.images[target.base_index]
    top_size = target.chain.top.virtual_size
    if base.image is None:
        size_after = max(base.info.virtual_size, top_size)
        return _raw_survey(target, opened, size_after, shares=False)
    image = base.image
    report, references = check_with_references(image)
    if not report.sound:
        return _without_figures(report, None)
    # Nobody gives back what is leaked while a VM has the image open.
    leaks = find_leaks(image, report, references, leaked_before(base.info.real_path))
    layout = _layout(image, counted_as_used(references, leaks.leaked).counts)
    about = BaseFacts(
        image=image.name,
        header=image.header,
        backing_size=_backing_size(target),
        shared=layout.shared,
    )
    obstacle = growth_obstacle(about, top_size) or _end_obstacle(image, about, top_size)
    if obstacle is not None:
        return _without_figures(report, obstacle)
    arrivals = _arrivals(target, opened, about)
    staying = [name for name in base.entries if name not in stale]
    freed = bitmap_clusters(image, staying) if stale else np.zeros(0, dtype=np.int64)
    need = space_need(
        MergeDemand(
            header=image.header,
            layout=layout,
            old_bitmaps=_runs_of(freed),
            prunes=bool(stale),
            stand_ins=(),
            final_bitmaps=tuple(stored),
            arrivals=arrivals,
            virtual_size_after=max(image.header.virtual_size, top_size),
        )
    )
    # Each removal writes a directory beside the one before, into what was freed. The last one
    # cuts a run of free clusters in two, and the first of these can end too early for a request.
    directory = 0 if image.header.bitmaps is None else image.header.bitmaps.directory_size
    wasted = min(arrivals.largest - 1, len(freed))
    clusters = 2 * -(-directory // image.header.cluster_size) + wasted
    slack = clusters * image.header.cluster_size if stale else 0
    space = _facts(need)
    space = replace(
        space,
        required=space.required + slack,
        breakdown={**space.breakdown, **({"removals": slack} if slack else {})},
        new_clusters=arrivals.likely_clusters,
        new_l2_tables=arrivals.l2_tables,
    )
    space = replace(space, allocates=_allocated_by_qemu(target, opened, space))
    return SpaceSurvey({Placement.IN_PLACE: space}, {}, report, None, leaks)


def _raw_survey(target: Target, opened: OpenChain, size_after: int, *, shares: bool) -> SpaceSurvey:
    """What a raw base needs: as a file space for the data alone, as a volume its size."""
    base = opened.images[target.base_index]
    facts = _facts(raw_space_need(base.info.file_size, size_after))
    facts = replace(facts, allocates=missing_in_place(target, opened, shares=shares))
    return SpaceSurvey({Placement.IN_PLACE: facts}, {}, None, None)


def data_in_place(target: Target, opened: OpenChain, *, shares: bool) -> ByteRanges:
    """Where data is written at its guest offset: into a raw base, or an external data file.

    Without what the file system can share, if it *shares*.
    """
    kinds = (Kind.COMPRESSED,) if shares else (Kind.DATA, Kind.COMPRESSED)
    return data_ranges(opened.view(target.base_index + 1), kinds)


def missing_in_place(target: Target, opened: OpenChain, *, shares: bool) -> int | None:
    """Bytes that the file system has to give for :func:`data_in_place`; None for a device."""
    source = opened.images[target.base_index].layer.source
    space = space_of(source) if isinstance(source, AnyFile) else None
    return None if space is None else space.missing(data_in_place(target, opened, shares=shares))


def _allocated_by_qemu(target: Target, opened: OpenChain, space: SpaceFacts) -> int | None:
    """What a file system has to give a qcow2 file that QEMU writes to, at most.

    Where QEMU finds free clusters in the file is not known, so any of its holes may be filled,
    but no more of them than there is to write.
    """
    base = opened.images[target.base_index]
    assert base.image is not None
    on_file = space_of(base.readable) if isinstance(base.readable, AnyFile) else None
    if on_file is None:
        return None
    size, cluster = base.info.file_size, base.image.header.cluster_size
    grows = max(space.required - size, 0)
    new = (space.new_clusters + space.new_l2_tables) * cluster
    over_old = 0
    if base.info.data_file is None:
        over_old = on_file.missing(_written_over(target, opened))
    return grows + min(size - on_file.own.before(size).total, new + over_old)


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


def _survey_for_qemu(
    target: Target,
    opened: OpenChain,
    bitmaps: BitmapFacts,
    report: CheckReport,
    references: ReferenceCounts,
) -> SpaceSurvey:
    image = opened.images[target.base_index].image
    assert image is not None
    layout = _layout(image, references.counts)
    facts = BaseFacts(
        image=image.name,
        header=image.header,
        backing_size=_backing_size(target),
        shared=layout.shared,
    )
    top_size = target.chain.top.virtual_size
    obstacle = (
        growth_obstacle(facts, top_size)
        or _end_obstacle(image, facts, top_size)
        or _old_bytes_obstacle(opened.images[target.base_index], facts, top_size)
        or _data_file_obstacle(target, opened)
    )
    if obstacle is not None:
        return _without_figures(report, obstacle)
    arrivals = _arrivals(target, opened, facts)
    size_after = max(image.header.virtual_size, top_size)
    need = space_need(_demand(image, layout, arrivals, bitmaps, size_after))
    space = replace(
        _facts(need), new_clusters=arrivals.likely_clusters, new_l2_tables=arrivals.l2_tables
    )
    space = replace(space, allocates=_allocated_by_qemu(target, opened, space))
    return SpaceSurvey({Placement.IN_PLACE: space}, {}, report, None)


def _end_obstacle(image: Qcow2Image, facts: BaseFacts, top_size: int) -> CannotGrowBase | None:
    """Why the end of base's disk cannot be moved.

    QEMU hides what a longer backing file has behind the old end. Within base's last cluster it
    does so by zero subclusters, and a compressed cluster has none (QEMU 7.2: "Operation not
    supported").
    """
    header = image.header
    hidden_from = -(-header.virtual_size // header.subcluster_size) * header.subcluster_size
    if not facts.uncovers_backing(top_size) or hidden_from % header.cluster_size == 0:
        return None
    if lookup(image, header.virtual_size - 1).kind is not Kind.COMPRESSED:
        return None
    reason = "its last cluster is compressed, its clusters have parts, its backing file is longer"
    return CannotGrowBase(image.name, top_size, reason)


def _old_bytes_obstacle(
    base: OpenImage, facts: BaseFacts, top_size: int
) -> OldBytesBehindEnd | None:
    """Why what base holds behind its end would show; None where it is zeros or can be wiped."""
    assert base.image is not None
    if facts.uncovers_backing(top_size):
        # QEMU hides that by zeros, what base itself holds there included.
        return None
    found = old_bytes(base.image, base.layer.source, top_size)
    if found.obstacle is None:
        return None
    return OldBytesBehindEnd(str(base.info.path), top_size, found.obstacle)


def _data_file_obstacle(target: Target, opened: OpenChain) -> CannotGrow | None:
    """Why the data does not fit into base's external data file; None where it does."""
    data_file = target.base.data_file
    if data_file is None:
        return None
    volume = open_volume(data_file).facts()
    return volume.refusal(volume.size, missing_in_place(target, opened, shares=False))


def _facts(need: SpaceNeed) -> SpaceFacts:
    return SpaceFacts(need.image_end, need.required, need.optimal, need.breakdown, 0, 0, 0)


def _without_figures(report: CheckReport, obstacle: ChainmergeError | None) -> SpaceSurvey:
    """Nothing is to be said of an image that is damaged or cannot grow, but that it is refused."""
    end = report.image_end_offset
    nothing = SpaceFacts(end, end, end, {}, 0, 0, 0)
    return SpaceSurvey(dict.fromkeys(Placement, nothing), {}, report, obstacle)


def _backing_size(target: Target) -> int | None:
    if target.base_index == 0:
        return None
    return target.chain.images[target.base_index - 1].virtual_size


def _layout(image: Qcow2Image, counts: npt.NDArray[np.unsignedinteger]) -> HostLayout:
    windows = (counts[at : at + _WINDOW] for at in range(0, len(counts), _WINDOW))
    return layout_of(
        windows,
        read_refcount_table(image) != 0,
        image.header.cluster_size,
        refcounts_per_block(image.header),
    )


def _arrivals(target: Target, opened: OpenChain, facts: BaseFacts) -> Arrivals:
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
        old_bitmaps=_runs_of(bitmap_clusters(image)),
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


def _runs_of(clusters: npt.NDArray[np.int64]) -> Runs:
    """Ascending cluster numbers, perhaps with repetitions, as runs."""
    distinct = np.unique(clusters)
    heads = np.flatnonzero(np.diff(distinct, prepend=np.int64(-2)) != 1)
    tails = np.append(heads[1:], len(distinct)) - 1
    if not len(distinct):
        return Runs(distinct, distinct)
    return Runs(distinct[heads], distinct[tails] - distinct[heads] + 1)
