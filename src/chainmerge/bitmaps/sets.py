# SPDX-License-Identifier: Apache-2.0
"""The sets of bitmaps that base holds one after another during a merge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.bitmaps.comparing import bitmap_difference
from chainmerge.bitmaps.rules import BitmapState, Fate
from chainmerge.bitmaps.stored import state_of
from chainmerge.engines.metadata.bitmap_set import AnyBitmap, KeptBitmap, StoredBitmap
from chainmerge.engines.metadata.replacement import kept_where_unchanged
from chainmerge.options import Direction
from chainmerge.qcow2.bitmaps import BitmapFlag, read_directory, storable_granularity
from chainmerge.qcow2.bits import BitSet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainmerge.bitmaps.gathering import BitmapFacts
    from chainmerge.engines.native.decisions import MappedDisk
    from chainmerge.qcow2.image import Qcow2Image


def result_set(
    bitmaps: BitmapFacts, size_after: int, direction: Direction
) -> tuple[StoredBitmap, ...]:
    """The bitmaps that the result has in the end, as long as top exists."""
    if direction is Direction.PULL:
        return lasting_set(bitmaps, size_after)
    return final_set(bitmaps, size_after)


def bitmaps_to_store(
    image: Qcow2Image, bitmaps: BitmapFacts, disk: MappedDisk
) -> Sequence[AnyBitmap] | None:
    """The set that the result gets; None if it has it already."""
    if image.header.version < 3:
        return None
    final = result_set(bitmaps, disk.size_after, disk.direction)
    if bitmap_difference(image, final) is None:
        return None
    return kept_where_unchanged(image, final)


def bitmaps_without_stale(
    image: Qcow2Image, bitmaps: BitmapFacts, direction: Direction
) -> Sequence[AnyBitmap] | None:
    """The set of base's bitmaps once those are out of it that the merge does not keep.

    What is kept stays as it is, and tombstones stand where they must. None if nothing can
    be taken out.
    """
    if image.header.version < 3 or direction is Direction.PULL:
        return None
    kept = {d.name for d in bitmaps.decisions if d.fate is Fate.KEEP}
    guards = {one.name: one for one in stand_ins(bitmaps, image.header.virtual_size)}
    remaining: list[AnyBitmap] = []
    entries = read_directory(image)
    for entry in entries:
        state = state_of(image, entry)
        if entry.name in kept and state is BitmapState.VALID:
            remaining.append(KeptBitmap(entry))
        elif entry.name in guards:
            remaining.append(guards[entry.name])
    return remaining if len(remaining) < len(entries) else None


def stand_ins(bitmaps: BitmapFacts, disk_size: int) -> tuple[StoredBitmap, ...]:
    """What base holds while data is copied: only tombstones."""
    return tuple(
        _tombstone(bitmaps, decision.name, disk_size)
        for decision in bitmaps.decisions
        if decision.tombstone_while_top_exists or decision.name in bitmaps.base_bits
    )


def final_set(bitmaps: BitmapFacts, disk_size: int) -> tuple[StoredBitmap, ...]:
    """What base holds after the merge, as long as top exists."""
    kept = (
        StoredBitmap(decision.name, bitmaps.final_bits[decision.name], BitmapFlag.AUTO)
        for decision in bitmaps.decisions
        if decision.fate is Fate.KEEP
    )
    tombstones = (
        _tombstone(bitmaps, decision.name, disk_size)
        for decision in bitmaps.decisions
        if decision.tombstone_while_top_exists
    )
    return (*kept, *tombstones)


def lasting_set(bitmaps: BitmapFacts, disk_size: int) -> tuple[StoredBitmap, ...]:
    """What base holds once top is gone: without the tombstones that only top needed."""
    spent = spent_names(bitmaps)
    return tuple(bitmap for bitmap in final_set(bitmaps, disk_size) if bitmap.name not in spent)


def spent_names(bitmaps: BitmapFacts) -> frozenset[str]:
    """Names of which base has a tombstone that only top needs."""
    return frozenset(
        decision.name
        for decision in bitmaps.decisions
        if decision.tombstone_while_top_exists and not decision.tombstone
    )


def _tombstone(bitmaps: BitmapFacts, name: str, disk_size: int) -> StoredBitmap:
    """A tombstone of the granularity that the name has in the chain."""
    found = next(
        occurrence.granularity
        for layer in bitmaps.layers
        if (occurrence := layer.occurrence(name)).state is not BitmapState.ABSENT
    )
    return tombstone(name, disk_size, found)


def tombstone(name: str, disk_size: int, granularity: int) -> StoredBitmap:
    """A disabled bitmap without bits.

    Args:
        name: of the checkpoint.
        disk_size: guest bytes of the image that gets it.
        granularity: guest bytes a bit of the bitmap that it stands for; a coarser one is
            taken where such a bitmap could not be stored.
    """
    storable = storable_granularity(disk_size, granularity)
    return StoredBitmap(name, BitSet.empty(disk_size, storable), BitmapFlag(0))
