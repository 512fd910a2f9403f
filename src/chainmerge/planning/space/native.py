# SPDX-License-Identifier: Apache-2.0
"""What base needs for a merge by the native engine: exactly, table by table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from chainmerge.arithmetic.rounding import divide_up
from chainmerge.bitmaps.sets import bitmaps_to_store, bitmaps_without_stale
from chainmerge.engines.metadata.allocation import Demand, FreeSpace, allocate, counted_free_space
from chainmerge.engines.metadata.bitmap_set import lay_out
from chainmerge.engines.metadata.counting import table_with_new_blocks
from chainmerge.engines.metadata.old_tree import bitmap_clusters
from chainmerge.engines.metadata.replacement import names_kept
from chainmerge.engines.native.commit import merged_layers
from chainmerge.engines.native.decisions import MappedDisk
from chainmerge.engines.native.survey import (
    MappingNeed,
    NewTree,
    PlacedTree,
    new_tree,
    place_tree,
    released_clusters,
    survey_mapping,
)
from chainmerge.engines.native.zeroes import ViewWithZeroes, ZeroRanges
from chainmerge.options import Direction, Placement
from chainmerge.planning.choices import shares_extents
from chainmerge.planning.facts import SpaceFacts
from chainmerge.planning.space.errors import CannotGrowBase
from chainmerge.qcow2.header import L1_ENTRY_BYTES, MAX_L1_BYTES
from chainmerge.qcow2.references import ReferenceCounts
from chainmerge.storage.file_space import FileSpace, space_to_count, united
from chainmerge.storage.locks import AnyFile

if TYPE_CHECKING:
    from chainmerge.bitmaps.gathering import BitmapFacts
    from chainmerge.chain.opening import OpenChain
    from chainmerge.chain.target import Target
    from chainmerge.engines.metadata.snapshot_removal import SnapshotRemoval
    from chainmerge.qcow2.image import Qcow2Image

_WINDOW = 1 << 20


def mapped_disk(target: Target, image: Qcow2Image, direction: Direction) -> MappedDisk:
    """The image that is written, as the native engine sees it."""
    below = target.chain.images[: target.base_index]
    size = target.chain.top.virtual_size
    if direction is Direction.COMMIT:
        size = max(size, target.base.virtual_size)
    return MappedDisk(
        header=image.header,
        size_after=size,
        backing_end=below[-1].virtual_size if below else 0,
        direction=direction,
    )


def native_growth_obstacle(image: Qcow2Image, size_after: int) -> CannotGrowBase | None:
    """Why base's disk cannot become as large; None if it can or need not."""
    header = image.header
    if size_after <= header.virtual_size:
        return None
    if header.version < 3 and header.snapshot_count:
        reason = "it is a version 2 image, whose internal snapshots do not say how large they are"
        return CannotGrowBase(image.name, size_after, reason)
    entries = divide_up(size_after, header.cluster_size * header.l2_entries)
    if entries * L1_ENTRY_BYTES > MAX_L1_BYTES:
        reason = f"its L1 table would be larger than {MAX_L1_BYTES} bytes"
        return CannotGrowBase(image.name, size_after, reason)
    return None


class NativeFacts(Struct, frozen=True):
    """What base needs, by placement; ``needs`` is what the engine is to be given."""

    needs: Mapping[Placement, MappingNeed]
    spaces: Mapping[Placement, SpaceFacts]


def survey_native(
    target: Target,
    opened: OpenChain,
    bitmaps: BitmapFacts,
    references: ReferenceCounts,
    direction: Direction,
    zeroes: ZeroRanges | None,
    removal: SnapshotRemoval | None,
) -> NativeFacts:
    """Work out how large the result must be, for each way of placing data.

    That is exact, except for where snapshots are removed before: what was shared with them need not
    be copied then, and takes less.
    """
    image = opened.images[target.result_index(direction)].image
    assert image is not None
    disk = mapped_disk(target, image, direction)
    merged = merged_layers(opened.view(), target.base_index, direction)
    if zeroes is not None:
        merged = ViewWithZeroes(merged.layers, zeroes)
    needs = survey_mapping(image, disk, merged)
    file_space = _FileSpace.of(target, opened, direction)
    space = counted_free_space(image, references)
    used = _Used.of(references)
    if removal is not None:
        space = removal.space_after()
        used = used.after(removal)
    stored = bitmaps_to_store(image, bitmaps, disk)
    given_up = 0
    if stored is not None:
        given_up = len(bitmap_clusters(image, names_kept(stored)))
    pruned = _Pruned.of(image, bitmaps, references, space, direction)
    spaces = {}
    for placement, need in needs.items():
        tree = new_tree(image.name, disk, need, stored)
        placed = place_tree(tree, space)
        facts = replace(
            _facts(tree, placed, used, given_up),
            allocates=file_space.missing(tree, placed),
            end_after=_end_after(image, tree, placed, references, used),
        )
        if pruned is not None:
            placed = place_tree(tree, pruned.space)
            end = max(used.end, pruned.end, placed.allocation.end)
            facts = replace(
                facts,
                required_if_pruned=end * disk.header.cluster_size,
                allocates_if_pruned=file_space.missing(tree, placed),
            )
        spaces[placement] = facts
    return NativeFacts(needs, spaces)


def _end_after(
    image: Qcow2Image,
    tree: NewTree,
    placed: PlacedTree,
    references: ReferenceCounts,
    used: _Used,
) -> int:
    """Where the image ends once what only its old tree uses is released, in bytes."""
    first = placed.allocation.end
    left = references.counts[first : used.end].astype(np.int64)
    if len(left):
        released = released_clusters(image, tree, placed, tree.mapping.released)
        start = np.clip(released.start - first, 0, len(left))
        end = np.clip(released.end - first, 0, len(left))
        steps = np.bincount(start, minlength=len(left) + 1)
        steps -= np.bincount(end, minlength=len(left) + 1)
        left -= np.cumsum(steps[:-1])
    still = np.flatnonzero(left)
    last = first + int(still[-1]) + 1 if len(still) else first
    return last * image.header.cluster_size


class _FileSpace(Struct, frozen=True):
    """What the file that is written has of its own; *space* is None for a device."""

    space: FileSpace | None
    shares_extents: bool

    @staticmethod
    def of(target: Target, opened: OpenChain, direction: Direction) -> _FileSpace:
        readable = opened.images[target.result_index(direction)].readable
        space = space_to_count(readable) if isinstance(readable, AnyFile) else None
        return _FileSpace(space, shares_extents(opened, target.base_index, direction))

    def missing(self, tree: NewTree, placed: PlacedTree) -> int | None:
        """Bytes that the file system has to give it."""
        if self.space is None:
            return None
        size = tree.disk.header.cluster_size
        if self.shares_extents:
            runs = placed.metadata
            written = united([(runs.start * size, runs.end * size)])
            return self.space.missing(written) + tree.mapping.unpacked * size
        runs = placed.allocation.everything
        written = united([(runs.start * size, runs.end * size), *tree.mapping.in_place])
        return self.space.missing(written)


class _Pruned(Struct, frozen=True):
    """Base's file once stale bitmaps are out of it, and how far that reaches at its peak."""

    space: FreeSpace
    end: int

    @staticmethod
    def of(
        image: Qcow2Image,
        bitmaps: BitmapFacts,
        references: ReferenceCounts,
        space: FreeSpace,
        direction: Direction,
    ) -> _Pruned | None:
        """None if nothing can be taken out."""
        remaining = bitmaps_without_stale(image, bitmaps, direction)
        if remaining is None:
            return None
        layout = lay_out(image.name, image.header, remaining)
        allocation = allocate(space, layout.demand)
        placed = allocation.everything.expanded()
        counts = np.zeros(max(len(references.counts), allocation.end), references.counts.dtype)
        counts[: len(references.counts)] = references.counts
        counts[placed] = 1
        released = bitmap_clusters(image, names_kept(remaining))
        counts[released] = 0
        header = image.header
        if allocation.table_start is not None:
            header = replace(header, refcount_table_clusters=allocation.table_clusters)
        table = table_with_new_blocks(image.header, space.table, allocation)
        after = ReferenceCounts(references.cluster_size, counts, references.complete)
        return _Pruned(FreeSpace(image.name, header, table, len(counts), after.of), allocation.end)


class _Used(Struct, frozen=True):
    """Clusters of base's file: how many are in use, and the end of the last of them."""

    count: int
    end: int

    @staticmethod
    def of(references: ReferenceCounts) -> _Used:
        count = end = 0
        for first in range(0, len(references.counts), _WINDOW):
            used = np.flatnonzero(references.counts[first : first + _WINDOW])
            count += len(used)
            if len(used):
                end = first + int(used[-1]) + 1
        return _Used(count, end)

    def after(self, removal: SnapshotRemoval) -> _Used:
        """The same once snapshots are removed."""
        count = self.count - len(removal.freed) + removal.allocation.everything.total
        return _Used(count, max(self.end, removal.allocation.end))


def _facts(tree: NewTree, placed: PlacedTree, used: _Used, old_bitmaps: int) -> SpaceFacts:
    cluster_size = tree.disk.header.cluster_size
    required = max(used.end, placed.allocation.end)
    demand = tree.demand
    new = placed.allocation.everything.total
    parts = {
        "used": used.count,
        "data": tree.mapping.data,
        "L2 tables": tree.mapping.tables,
        "L1 table": tree.l1_clusters,
        "bitmaps": 0 if tree.bitmaps is None else _clusters(tree.bitmaps.demand),
        "refcounts": new - _clusters(demand),
    }
    parts["gaps"] = required - sum(parts.values())
    optimal = used.count + new - tree.mapping.given_up - old_bitmaps
    return SpaceFacts(
        image_end=used.end * cluster_size,
        required=required * cluster_size,
        optimal=min(optimal, required) * cluster_size,
        breakdown={part: count * cluster_size for part, count in parts.items() if count},
        new_clusters=tree.mapping.data,
        new_l2_tables=tree.mapping.tables,
        written=tree.mapping.written,
    )


def _clusters(demand: Demand) -> int:
    return demand.scattered + sum(demand.contiguous)
