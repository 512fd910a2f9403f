# SPDX-License-Identifier: Apache-2.0
"""Top's checkpoints after a VM died that pulled into it: what was saved of them, if it holds.

QEMU opens an image for writing to pull into it, and leaves its bitmaps in-use where it dies. Those
of an image that no guest wrote to can be told all the same: they are what was saved, united with
those of the images below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.bitmaps.rules import BitmapState
from chainmerge.bitmaps.stored import state_of
from chainmerge.engines.metadata.bitmap_set import AnyBitmap, KeptBitmap, StoredBitmap
from chainmerge.qcow2.bitmaps import BitmapFlag, read_bits, read_directory
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.records.changes import is_there
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from chainmerge.qcow2.bits import BitSet
    from chainmerge.records.saved_bitmaps import SavedBitmap, SavedBitmaps


def bitmaps_left_in_use(top: Qcow2Image, saved: SavedBitmaps | None) -> dict[str, BitSet]:
    """The bitmaps of *top* that are in-use, and what they are by what a live pull has saved.

    They hold if the image above is still the same one and has not lost any of its own: whoever
    wrote to top since has destroyed it.
    """
    if saved is None or not (saved.is_of_pull and is_there(saved.overlay)):
        return {}
    states = {entry.name: state_of(top, entry) for entry in read_directory(top)}
    with FileReadable(saved.overlay.path) as readable:
        above = Qcow2Image(readable)
        return {
            one.name: one.in_base
            for one in saved.bitmaps
            if one.in_base is not None
            and states.get(one.name) is BitmapState.IN_USE
            and _still_has(above, one)
        }


def _still_has(above: Qcow2Image, saved: SavedBitmap) -> bool:
    """Whether the image above has all the bits that it had; the VM may have left it in-use."""
    then = saved.in_overlay
    entry = next((one for one in read_directory(above) if one.name == saved.name), None)
    if then is None or entry is None:
        return False
    match state_of(above, entry):
        case BitmapState.IN_USE:
            return True
        case BitmapState.VALID:
            now = read_bits(above, entry)
            return now.with_geometry(then.disk_size, then.granularity).covers(then)
        case _:
            return False


def bitmaps_restored(top: Qcow2Image, saved: SavedBitmaps | None) -> list[AnyBitmap] | None:
    """All of top's bitmaps, with those that were left in-use as they are; None if none was."""
    left = bitmaps_left_in_use(top, saved)
    if not left:
        return None
    return [
        StoredBitmap(entry.name, left[entry.name], BitmapFlag.AUTO)
        if entry.name in left
        else KeptBitmap(entry)
        for entry in read_directory(top)
    ]
