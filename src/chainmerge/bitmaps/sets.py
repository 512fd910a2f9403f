# SPDX-License-Identifier: Apache-2.0
"""The sets of bitmaps that base holds, one after the other, in the course of a merge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.bitmaps.rules import BitmapState, Fate
from chainmerge.bitmaps.tombstones import tombstone
from chainmerge.engines.metadata import StoredBitmap
from chainmerge.qcow2.bitmaps import BitmapFlag

if TYPE_CHECKING:
    from chainmerge.chain.target import BitmapFacts


def stand_ins(bitmaps: BitmapFacts, disk_size: int) -> tuple[StoredBitmap, ...]:
    """What stands in base while data is copied: tombstones, nothing else."""
    return tuple(
        _tombstone(bitmaps, decision.name, disk_size)
        for decision in bitmaps.decisions
        if decision.tombstone_while_top_exists or decision.name in bitmaps.base_bits
    )


def final_set(bitmaps: BitmapFacts, disk_size: int) -> tuple[StoredBitmap, ...]:
    """What stands in base after the merge, as long as top exists."""
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
    """What stands in base once top is gone: without the tombstones that only top needed."""
    spent = {
        decision.name
        for decision in bitmaps.decisions
        if decision.tombstone_while_top_exists and not decision.tombstone
    }
    return tuple(bitmap for bitmap in final_set(bitmaps, disk_size) if bitmap.name not in spent)


def _tombstone(bitmaps: BitmapFacts, name: str, disk_size: int) -> StoredBitmap:
    """A tombstone of the granularity that the name has in the chain."""
    found = next(
        occurrence.granularity
        for layer in bitmaps.layers
        if (occurrence := layer.occurrence(name)).state is not BitmapState.ABSENT
    )
    return tombstone(name, disk_size, found)
