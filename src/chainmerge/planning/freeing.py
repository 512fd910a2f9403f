# SPDX-License-Identifier: Apache-2.0
"""What storage gets back by a merge, in bytes: of file systems, and of volume groups.

A file gives back the space that it occupies. A logical volume gives its extents back to its volume
group, and what the merge takes of the same group for its result is counted against that. Of a thin
volume nothing is counted: what its pool gets back depends on the blocks that it shares with others.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING

from chainmerge.options import Direction
from chainmerge.planning.aftermath import planned_snapshots, removed_images
from chainmerge.planning.placement import allocated_bytes, planned_space
from chainmerge.storage.allocation import STAT_BLOCK
from chainmerge.storage.lvm import group_as_pool
from chainmerge.storage.lvm_volumes import footprints
from chainmerge.storage.volume_facts import VolumeKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from chainmerge.chain.model import Chain, Identity, ImageInfo
    from chainmerge.options import MergeOptions
    from chainmerge.planning.facts import MergeFacts
    from chainmerge.storage.lvm_volumes import Footprint


def bytes_occupied(chain: Chain) -> Mapping[Identity, int]:
    """What the files of images take of their file systems; block devices are left out."""
    occupied = {}
    for image in chain.images:
        # Where one has just been deleted, whatever reads it says so.
        with contextlib.suppress(OSError):
            if not image.is_block_device:
                occupied[image.identity] = image.real_path.stat().st_blocks * STAT_BLOCK
    return occupied


def footprints_of(images: Iterable[ImageInfo]) -> Mapping[Identity, Footprint]:
    """What the logical volumes that images are on take of their groups, as far as LVM tells."""
    devices = {image.real_path: image.identity for image in images if image.is_block_device}
    return {devices[path]: footprint for path, footprint in footprints(devices).items()}


def shared_bytes(facts: MergeFacts) -> int:
    """What of the data that moves the result shares with the images that it comes from."""
    if not facts.shares or facts.merged or facts.content_merged:
        return 0
    return facts.pull_bytes if facts.direction is Direction.PULL else facts.movement.data_bytes


def freed_bytes(facts: MergeFacts, options: MergeOptions) -> int:
    """What storage gets back by a merge: images that are removed, and snapshots."""
    snapshots = (
        planned_snapshots(views, facts, options)
        for views in facts.snapshots
        # A device is as large without them.
        if not views.image.is_block_device
    )
    dropped = sum(one.freed for one in snapshots if one.dropped)
    return dropped + _without(removed_images(facts, options), facts, options)


def deletable_bytes(facts: MergeFacts, options: MergeOptions) -> int:
    """What storage would get back without the images that are merged."""
    return _without(facts.merged_images, facts, options)


def taken_for_good(
    claim: Mapping[str, int], facts: MergeFacts, options: MergeOptions
) -> Mapping[str, int]:
    """What of its claim a merge has not given back once it is done.

    Args:
        claim: Bytes that it takes, by the pool that they come from.
        facts: What was found.
        options: How to merge.
    """
    if facts.volume.kind is VolumeKind.LVM:
        given_back: Mapping[str, int] = _extents_of(removed_images(facts, options), facts)
    else:
        images = facts.chain.images[facts.base_index :]
        share_a_pool = len({image.identity[0] for image in images}) == 1
        given_back = dict.fromkeys(claim, freed_bytes(facts, options) if share_a_pool else 0)
    return {pool: max(0, taken - given_back.get(pool, 0)) for pool, taken in claim.items()}


def _without(images: Sequence[ImageInfo], facts: MergeFacts, options: MergeOptions) -> int:
    occupied = sum(facts.occupied.get(image.identity, 0) for image in images)
    groups = _extents_of(images, facts)
    groups.subtract(_extents_added(facts, options))
    return max(0, occupied - shared_bytes(facts)) + sum(max(0, net) for net in groups.values())


def _extents_of(images: Iterable[ImageInfo], facts: MergeFacts) -> Counter[str]:
    """Bytes that volume groups get back without images, by the pool that these are."""
    extents: Counter[str] = Counter()
    for footprint in filter(None, (facts.footprints.get(image.identity) for image in images)):
        extents[group_as_pool(footprint.group)] += footprint.size
    return extents


def _extents_added(facts: MergeFacts, options: MergeOptions) -> Mapping[str, int]:
    """Bytes that the volume of the result has more of its group afterwards, or its pool has.

    Less than 0 where it is made smaller.
    """
    volume, footprint = facts.volume, facts.footprints.get(facts.result.identity)
    if footprint is None or volume.kind is not VolumeKind.LVM:
        return {}
    group = group_as_pool(footprint.group)
    if volume.thin is not None:
        return {group: volume.pool_extension(allocated_bytes(facts, options)).of_group}
    space = planned_space(facts, options)
    size = next(filter(None, (space.shrink_to, space.grow_to)), volume.size)
    return {group: (size - volume.size) // volume.growth_unit * volume.unit_cost}
