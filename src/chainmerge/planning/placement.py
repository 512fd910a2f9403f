# SPDX-License-Identifier: Apache-2.0
"""Where data goes in base, and how large base becomes. All sizes are in bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.arithmetic.rounding import round_up
from chainmerge.documents.plan import PlannedPool, SpacePlan
from chainmerge.options import LEFT_TO_A_GUEST, Placement
from chainmerge.storage.volume_facts import VolumeFacts, VolumeKind

if TYPE_CHECKING:
    from chainmerge.options import MergeOptions
    from chainmerge.planning.facts import MergeFacts, SpaceFacts


def choose_placement(facts: MergeFacts, options: MergeOptions) -> Placement:
    """Where data goes that base has a cluster for.

    Not over the old content, where there is the space: a file may take it from its file
    system, a volume has what it has, since making it larger than the merged image will be is
    for others to pay for.
    """
    if options.data != "auto" and Placement(options.data) in facts.spaces:
        return Placement(options.data)
    if Placement.COW not in facts.spaces:
        return Placement.IN_PLACE
    cow = facts.spaces[Placement.COW]
    whole = _is_there(cow.required, cow.allocates, facts.volume)
    least = cow.required_if_pruned
    pruned = least is not None and _is_there(least, cow.allocates_if_pruned, facts.volume)
    return Placement.COW if whole or pruned else Placement.IN_PLACE


def _is_there(required: int, allocates: int | None, volume: VolumeFacts) -> bool:
    if volume.takes_as_written:
        return not volume.growth(required, allocates).missing
    return required <= volume.size


def prunes_first(facts: MergeFacts, options: MergeOptions) -> bool:
    """Whether stale bitmaps are taken out by a switch of their own, to make room for the merge.

    Where there is room, all that changes changes in one switch.
    """
    space = chosen_space(facts, options)
    if space.least >= space.required:
        return False
    return not _is_there(space.required, space.allocates, facts.volume)


def chosen_space(facts: MergeFacts, options: MergeOptions) -> SpaceFacts:
    """What base will need with data placed as chosen."""
    return facts.spaces[choose_placement(facts, options)]


def bytes_to_copy(facts: MergeFacts) -> int:
    """Guest bytes that a commit by QEMU writes into base."""
    movement = facts.movement
    return movement.data_bytes + movement.zero_bytes + movement.compressed_bytes


def planned_space(facts: MergeFacts, options: MergeOptions) -> SpacePlan:
    volume, required = facts.volume, required_bytes(facts, options)
    space = chosen_space(facts, options)
    allocates = allocated_bytes(facts, options)
    growth = volume.growth(required, allocates)
    limit = volume.capacity_limit
    if limit is None and volume.free_bytes is not None:
        limit = volume.size + volume.free_bytes
    return SpacePlan(
        kind=volume.kind,
        size=volume.size,
        image_end=space.image_end,
        required=required,
        limit=limit,
        grow_to=(
            growth.size_after if growth.size_after > volume.size and not growth.missing else None
        ),
        missing=growth.missing,
        allocates=allocates if volume.takes_as_written else None,
        breakdown=dict(space.breakdown),
        shrink_to=_shrink_to(facts, options, growth.size_after),
        placement=choose_placement(facts, options),
        required_by_placement={
            str(placement): one.least for placement, one in sorted(facts.spaces.items())
        },
        prune_first=prunes_first(facts, options),
        pool=_planned_pool(volume, allocates),
    )


def _planned_pool(volume: VolumeFacts, allocates: int | None) -> PlannedPool | None:
    pool = volume.thin
    if pool is None:
        return None
    extend_by = volume.pool_extension(allocates).total
    return PlannedPool(pool.name, pool.free, pool.metadata_free, extend_by)


def _shrink_to(facts: MergeFacts, options: MergeOptions, size: int) -> int | None:
    """What a volume of *size* bytes is reduced to.

    Where QEMU writes, or stale bitmaps are taken out first, it is not known where the image will
    end, but it is not behind what the merge needs at most.
    """
    volume = facts.volume
    if not options.shrink or volume.kind is not VolumeKind.LVM or facts.result.header is None:
        return None
    space, required = chosen_space(facts, options), required_bytes(facts, options)
    known = space.end_after is not None and not facts.merged and not prunes_first(facts, options)
    end = space.end_after if known and space.end_after is not None else required
    kept = end + left_free(options, is_leaf=not facts.relatives.children)
    return min(round_up(kept, volume.growth_unit), size)


def left_free(options: MergeOptions, *, is_leaf: bool) -> int:
    """Bytes that a reduced volume keeps beyond what its image needs."""
    if options.leave is not None:
        return options.leave
    return LEFT_TO_A_GUEST if is_leaf else 0


def required_bytes(facts: MergeFacts, options: MergeOptions) -> int:
    space = chosen_space(facts, options)
    if facts.merged:
        return space.image_end
    return space.least if prunes_first(facts, options) else space.required


def allocated_bytes(facts: MergeFacts, options: MergeOptions) -> int | None:
    """What the file system has to give the file that is written; None if that is not known."""
    space = chosen_space(facts, options)
    if facts.merged:
        return 0
    return space.allocates_if_pruned if prunes_first(facts, options) else space.allocates
