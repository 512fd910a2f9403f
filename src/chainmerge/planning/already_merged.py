# SPDX-License-Identifier: Apache-2.0
"""Whether base already holds what the merge would give it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from chainmerge.bitmaps.comparing import bitmap_difference
from chainmerge.bitmaps.sets import final_set
from chainmerge.chain.comparing import base_shows_all
from chainmerge.options import Direction, MergeOptions
from chainmerge.planning.aftermath import removed_images
from chainmerge.planning.encryption import encrypted_difference, has_encrypted, key_obstacles
from chainmerge.records.changes import data_changed
from chainmerge.records.errors import MergedBefore
from chainmerge.records.remains import is_left_over

if TYPE_CHECKING:
    from chainmerge.bitmaps.gathering import BitmapFacts
    from chainmerge.chain.opening import OpenChain
    from chainmerge.chain.target import Target
    from chainmerge.documents.progress import ShouldStop
    from chainmerge.planning.facts import MergeFacts
    from chainmerge.records.merged_record import MergedRecord


def holds_bitmaps(target: Target, opened: OpenChain, bitmaps: BitmapFacts) -> bool:
    """Whether base has the bitmaps that the merge would give it."""
    image = opened.images[target.base_index].image
    if image is None:
        return True
    return bitmap_difference(image, final_set(bitmaps, target.base.virtual_size)) is None


def was_merged_before(
    target: Target, facts: MergeFacts, record: MergedRecord | None, options: MergeOptions
) -> bool:
    """Whether all of top went into base, so that what base lacks of it is old data."""
    if options.despite_newer_base:
        return False
    # A pull leaves base as it is, unless it is told to delete it.
    if facts.direction is Direction.PULL and facts.base not in removed_images(facts, options):
        return False
    return is_left_over(record, target.base.real_path, target.chain.top.real_path)


def base_changed_since(record: MergedRecord | None) -> bool:
    if record is None or record.left is None:
        return True
    left = record.left
    return left.base_since != data_changed(Path(record.base))


def merged_before(target: Target) -> MergedBefore:
    return MergedBefore(str(target.chain.top.path), str(target.base.path))


def holds_content(
    target: Target,
    opened: OpenChain,
    facts: MergeFacts,
    options: MergeOptions,
    should_stop: ShouldStop,
) -> bool:
    """Whether base shows what top shows: an earlier run has copied everything.

    The tables can rule it out in most cases; otherwise content is compared up to the first
    difference.
    """
    base, top = target.base, target.chain.top
    if facts.undefined_bytes or base.virtual_size < top.virtual_size:
        return False
    if facts.result_check is not None and not facts.result_check.sound:
        return False
    if has_encrypted(target.chain):
        return _holds_encrypted_content(target, options, should_stop)
    return base_shows_all(opened, target.base_index, should_stop)


def _holds_encrypted_content(
    target: Target, options: MergeOptions, should_stop: ShouldStop
) -> bool:
    if any(key_obstacles(target.chain, options)):
        return False
    where = target.base_index
    return encrypted_difference(target.chain, where, options, should_stop) is None
