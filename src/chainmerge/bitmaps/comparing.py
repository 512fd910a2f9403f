# SPDX-License-Identifier: Apache-2.0
"""Whether an image has the bitmaps that it should have."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from chainmerge.arithmetic.counting import counted
from chainmerge.qcow2.bitmaps import BitmapEntry, BitmapFlag, read_bits, read_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainmerge.engines.metadata.bitmap_set import StoredBitmap
    from chainmerge.qcow2.bits import BitSet
    from chainmerge.qcow2.image import Qcow2Image

# How the bits found differ from those that were planned; None if they do not.
_BitsDiffer: TypeAlias = "Callable[[BitSet, BitSet], str | None]"


def bitmap_difference(image: Qcow2Image, expected: Sequence[StoredBitmap]) -> str | None:
    """How an image's bitmaps differ from the expected set; None if they do not.

    Raises FormatError if they cannot be read.
    """
    return _set_difference(image, expected, _bits_differ)


def bitmap_shortfall(image: Qcow2Image, expected: Sequence[StoredBitmap]) -> str | None:
    """What the expected set has and an image's bitmaps lack; None if they lack nothing.

    Raises FormatError if they cannot be read.
    """
    return _set_difference(image, expected, _bits_lack)


def _set_difference(
    image: Qcow2Image, expected: Sequence[StoredBitmap], bits_differ: _BitsDiffer
) -> str | None:
    entries = {entry.name: entry for entry in read_directory(image)}
    if entries and not image.header.bitmaps_trusted:
        return "its bitmaps are not marked consistent"
    wanted = {bitmap.name: bitmap for bitmap in expected}
    for name in sorted(wanted.keys() | entries.keys()):
        if name not in entries:
            return f"bitmap {name!r} is missing"
        if name not in wanted:
            return f"bitmap {name!r} should not be there"
        difference = _one_difference(image, entries[name], wanted[name], bits_differ)
        if difference is not None:
            return f"bitmap {name!r} {difference}"
    return None


def _one_difference(
    image: Qcow2Image, entry: BitmapEntry, wanted: StoredBitmap, bits_differ: _BitsDiffer
) -> str | None:
    if entry.in_use or not entry.readable:
        return "is inconsistent (in-use): it was not stored properly"
    if entry.auto != bool(wanted.flags & BitmapFlag.AUTO):
        return "is enabled" if entry.auto else "is disabled"
    if entry.granularity != wanted.bits.granularity:
        return f"has granularity {entry.granularity}, not {wanted.bits.granularity}"
    return bits_differ(read_bits(image, entry), wanted.bits)


def _bits_differ(found: BitSet, wanted: BitSet) -> str | None:
    if found == wanted:
        return None
    return (
        f"has {counted(found.count(), 'dirty bit')}, but not exactly the {wanted.count()} planned"
    )


def _bits_lack(found: BitSet, wanted: BitSet) -> str | None:
    if found.covers(wanted):
        return None
    return (
        f"has {counted(found.count(), 'dirty bit')}, but lacks some of the {wanted.count()} planned"
    )
