# SPDX-License-Identifier: Apache-2.0
"""What the file system gets back once images are gone. All sizes are in bytes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from chainmerge.options import Direction
from chainmerge.planning.aftermath import planned_snapshots, removed_images

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from chainmerge.chain.model import Chain, Identity, ImageInfo
    from chainmerge.options import MergeOptions
    from chainmerge.planning.facts import MergeFacts

# The unit of st_blocks.
_STAT_BLOCK: Final = 512


def bytes_occupied(chain: Chain) -> Mapping[Identity, int]:
    """What the files of images take of their file systems.

    Block devices are left out: nobody gets back what they take, as long as they are there.
    """
    occupied = {}
    for image in chain.images:
        # Where one has just been deleted, whatever reads it says so.
        with contextlib.suppress(OSError):
            if not image.is_block_device:
                occupied[image.identity] = image.real_path.stat().st_blocks * _STAT_BLOCK
    return occupied


def shared_bytes(facts: MergeFacts) -> int:
    """What of the data that moves the result shares with the images that it comes from."""
    if not facts.shares or facts.merged or facts.content_merged:
        return 0
    return facts.pull_bytes if facts.direction is Direction.PULL else facts.movement.data_bytes


def freed_bytes(facts: MergeFacts, options: MergeOptions) -> int:
    """What the file system gets back by a merge: images that are removed, and snapshots."""
    snapshots = (planned_snapshots(views, facts, options) for views in facts.snapshots)
    dropped = sum(one.freed for one in snapshots if one.dropped)
    return dropped + _without(facts, removed_images(facts, options))


def deletable_bytes(facts: MergeFacts) -> int:
    """What the file system would get back without the images that are merged."""
    return _without(facts, facts.merged_images)


def _without(facts: MergeFacts, images: Iterable[ImageInfo]) -> int:
    occupied = sum(facts.occupied.get(image.identity, 0) for image in images)
    return max(0, occupied - shared_bytes(facts))
