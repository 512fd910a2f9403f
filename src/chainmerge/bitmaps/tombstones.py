# SPDX-License-Identifier: Apache-2.0
"""The mark that keeps a broken checkpoint from looking whole; see docs/design.md."""

from __future__ import annotations

from chainmerge.chain.target import storable_granularity
from chainmerge.engines.metadata import StoredBitmap
from chainmerge.qcow2.bitmaps import BitmapFlag
from chainmerge.qcow2.bits import BitSet


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
