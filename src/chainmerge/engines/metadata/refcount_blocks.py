# SPDX-License-Identifier: Apache-2.0
"""Changing stored refcounts: the writes that set those of given clusters.

A refcount never straddles a 512-byte sector, so a write to a block that is torn at
sectors leaves every refcount either old or new.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chainmerge.engines.metadata.allocation import slices_by
from chainmerge.qcow2.header import SECTOR, Header
from chainmerge.qcow2.refcounts import Refcounts, refcounts_per_block, unpack_refcounts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.arithmetic.arrays import U8Array, U64Array
    from chainmerge.qcow2.readable import Readable
    from chainmerge.qcow2.runs import Clusters

Write = tuple[int, bytes]
"""File offset and bytes."""


def refcount_writes(
    image: Readable,
    header: Header,
    table: U64Array,
    clusters: Clusters,
    refcounts: U64Array,
) -> Iterator[Write]:
    """Writes into existing refcount blocks that give *clusters* the *refcounts*.

    Args:
        image: Where the blocks are read from, each when its write is asked for.
        header: The image's header.
        table: The refcount table, file offsets of blocks.
        clusters: Ascending; the table has a block for each.
        refcounts: As many, each within the image's refcount width.
    """
    entries = refcounts_per_block(header)
    for part in slices_by(clusters, entries):
        index = int(clusters[part.start]) // entries
        offset = int(table[index])
        assert offset, "a cluster without a refcount block was to be counted"
        within = clusters[part] - index * entries
        low = int(within[0]) * header.refcount_bits // 8 // SECTOR * SECTOR
        high = (int(within[-1]) * header.refcount_bits // 8 // SECTOR + 1) * SECTOR
        old = image.read(offset + low, high - low)
        skipped = low * 8 // header.refcount_bits
        new = with_refcounts(old, header.refcount_order, within - skipped, refcounts[part])
        yield offset + low, new


def with_refcounts(
    block: bytes, refcount_order: int, entries: Clusters, refcounts: U64Array
) -> bytes:
    """Refcount block bytes (or some sectors of them) with the given entries changed."""
    values = unpack_refcounts(block, refcount_order).copy()
    values[entries] = refcounts
    return pack_refcounts(values, refcount_order)


def pack_refcounts(refcounts: Refcounts, refcount_order: int) -> bytes:
    """The inverse of :func:`chainmerge.qcow2.refcounts.unpack_refcounts`."""
    if refcount_order >= 3:
        return refcounts.astype(f">u{1 << (refcount_order - 3)}").tobytes()
    bits = 1 << refcount_order
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = refcounts.astype(np.uint8).reshape(-1, len(shifts)) << shifts
    octets: U8Array = np.bitwise_or.reduce(parts, axis=1)
    return octets.tobytes()
