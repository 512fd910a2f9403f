# SPDX-License-Identifier: Apache-2.0
"""Sets of bitmaps, random and stored."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from chainmerge.engines.metadata.bitmap_set import StoredBitmap
from chainmerge.qcow2.bitmaps import BitmapFlag, read_bits, read_directory
from chainmerge.qcow2.bits import BitSet

if TYPE_CHECKING:
    from chainmerge.qcow2.image import Qcow2Image


MIB = 1 << 20
AUTO = BitmapFlag.AUTO
DISABLED = BitmapFlag(0)


def random_bits(seed: int, size: int, granularity: int) -> BitSet:
    """Bits of every kind: some alone, some in runs, some as long as a bitmap's cluster."""
    choice = random.Random(seed)
    ranges = []
    for _ in range(choice.randrange(8)):
        start = choice.randrange(size)
        longest = choice.choice((1, granularity, 64 * granularity, size))
        ranges.append((start, choice.randrange(min(longest, size - start)) + 1))
    return BitSet.from_ranges(ranges, size, granularity)


def random_set(seed: int, size: int, count: int, granularity: int = 512) -> list[StoredBitmap]:
    flags = (AUTO, AUTO, DISABLED)
    return [
        StoredBitmap(
            f"bitmap {number} of {seed}",
            random_bits(seed * 1000 + number, size, granularity << number % 3),
            flags[number % 3],
        )
        for number in range(count)
    ]


def stored_set(image: Qcow2Image) -> list[StoredBitmap]:
    """The bitmaps as our own parser reads them back."""
    return [
        StoredBitmap(entry.name, read_bits(image, entry), entry.flags)
        for entry in read_directory(image)
    ]
