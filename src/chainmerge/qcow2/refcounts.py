# SPDX-License-Identifier: Apache-2.0
"""The refcounts that an image stores: how often each cluster of its file is used.

Rules are those of the qcow2 specification ("Host cluster management"): a table of one
level names the refcount blocks, each of one cluster; a cluster without a block has
refcount 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from chainmerge.arithmetic.distinct import distinct
from chainmerge.arithmetic.rounding import divide_up, round_up
from chainmerge.qcow2.gather import read_pieces
from chainmerge.qcow2.table_errors import BadRefcountTable

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from chainmerge.arithmetic.arrays import U64Array
    from chainmerge.qcow2.header import Header
    from chainmerge.qcow2.image import Qcow2Image

#: Refcounts in the narrowest dtype that holds them: uint8, uint16, uint32 or uint64.
Refcounts: TypeAlias = "npt.NDArray[np.unsignedinteger[Any]]"
BLOCK_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00
RESERVED = 0x1FF
ENTRY_SIZE = 8
_CLUSTERS_AT_ONCE = 1 << 20


def refcounts_per_block(header: Header) -> int:
    """How many clusters one refcount block describes."""
    return header.cluster_size * 8 // header.refcount_bits


def refcount_dtype(header: Header) -> np.dtype[np.unsignedinteger[Any]]:
    """The narrowest dtype that holds the image's refcounts."""
    return np.dtype(f"u{max(1, header.refcount_bits // 8)}")


def read_refcount_table(image: Qcow2Image) -> U64Array:
    """The entries of the refcount table as they are stored, at most 1 Mi of them.

    An entry is the file offset of a refcount block, 0 if there is none. Whether it can be
    one is judged where the block is read.
    """
    header = image.header
    entries = header.refcount_table_clusters * header.cluster_size // ENTRY_SIZE
    return _table_part(image, 0, entries)


def require_refcount_blocks(image: Qcow2Image) -> None:
    """Judge all entries of the refcount table.

    Raises:
        BadRefcountTable: as :func:`read_refcounts`.
    """
    _judge_entries(image, 0, read_refcount_table(image))


def read_refcounts(image: Qcow2Image, first: int, count: int) -> U64Array:
    """The stored refcounts of clusters *first* to *first + count*: uint64[count].

    Clusters that no block describes have refcount 0, also those behind the end of the file
    or of the refcount table. Blocks that do not exist are not read.

    Raises:
        BadRefcountTable: an entry has reserved bits set, or names a block that is not at the
            start of a cluster or not in the file.
    """
    header = image.header
    per_block = refcounts_per_block(header)
    entries = header.refcount_table_clusters * header.cluster_size // ENTRY_SIZE
    start = min(first // per_block, entries)
    end = min(divide_up(first + count, per_block), entries)
    table = _table_part(image, start, end)
    _judge_entries(image, start, table)
    result = np.zeros(count, dtype=np.uint64)
    for at, refcounts in stored_refcounts(image, table, start * per_block, first, count):
        result[at : at + len(refcounts)] = refcounts
    return result


def end_of_use(image: Qcow2Image) -> int:
    """Where the last cluster ends that has a refcount, in bytes.

    Raises:
        BadRefcountTable: an entry leads nowhere.
    """
    header = image.header
    present = np.flatnonzero(read_refcount_table(image))
    described = (int(present[-1]) + 1) * refcounts_per_block(header) if len(present) else 0
    end = min(divide_up(image.readable.size, header.cluster_size), described)
    while end:
        first = max(0, end - _CLUSTERS_AT_ONCE)
        used = np.flatnonzero(read_refcounts(image, first, end - first))
        if len(used):
            return (first + int(used[-1]) + 1) * header.cluster_size
        end = first
    return 0


def stored_refcounts(
    image: Qcow2Image, blocks: U64Array, blocks_first: int, first: int, count: int
) -> Iterator[tuple[int, Refcounts]]:
    """The refcounts of clusters *first* to *first + count*, as far as blocks describe them.

    Args:
        image: the image.
        blocks: file offsets of consecutive refcount blocks, 0 for one that is absent.
        blocks_first: the first cluster that they describe.
        first: first cluster asked for.
        count: number of clusters asked for; it bounds the memory in use.

    Yields:
        (position from *first*, refcounts in the narrowest dtype), ascending.
    """
    header = image.header
    per_block = refcounts_per_block(header)
    low = max(0, first - blocks_first) // per_block
    high = min(divide_up(max(0, first + count - blocks_first), per_block), len(blocks))
    present = np.flatnonzero(blocks[low:high]) + low
    if not len(present):
        return
    for run in np.split(present, np.flatnonzero(np.diff(present) != 1) + 1):
        data = read_pieces(image.readable, blocks[run], header.cluster_size)
        refcounts = unpack_refcounts(data, header.refcount_order)
        start = blocks_first + int(run[0]) * per_block
        cut = max(0, first - start)
        refcounts = refcounts[cut : first + count - start]
        yield start + cut - first, refcounts


class StoredRefcounts:
    """The refcounts of an image as they are stored, for one who asks for all of them repeatedly.

    Attributes:
        entries: the refcount table.
        blocks: the same, with 0 for blocks that are not aligned or not in the file. Reserved bits
            are ignored where the rest is usable, as QEMU does when it looks up a refcount.
    """

    def __init__(self, image: Qcow2Image) -> None:
        """Read the table."""
        self._image = image
        self.entries = read_refcount_table(image)
        self.blocks = np.zeros_like(self.entries)
        present = np.flatnonzero(self.entries)
        offsets = self.entries[present] & np.uint64(BLOCK_OFFSET_MASK)
        usable = offsets & np.uint64(image.header.cluster_size - 1) == 0
        usable &= offsets < np.uint64(image.readable.size)
        self.blocks[present[usable]] = offsets[usable]
        self._beginning: Refcounts | None = None

    def windows(self, clusters: int) -> Iterator[tuple[int, Refcounts]]:
        """The refcounts of all *clusters* in windows: (first cluster, refcounts).

        If one window has all of them, they are read once. They are not to be written to.
        """
        beginning = self._up_to(clusters)
        if len(beginning):
            yield 0, beginning[:clusters]
            return
        for first in range(0, clusters, _CLUSTERS_AT_ONCE):
            yield first, self._window(first, min(_CLUSTERS_AT_ONCE, clusters - first))

    def in_use_from(self, first: int) -> int:
        """How many clusters from *first* on have a refcount."""
        beginning = self._up_to(first)
        in_use = int(np.count_nonzero(beginning[first:]))
        rest = max(first, len(beginning))
        per_block = refcounts_per_block(self._image.header)
        at_once = max(1, _CLUSTERS_AT_ONCE // per_block)
        first_block = rest // per_block
        behind = np.flatnonzero(self.blocks[first_block:]) + first_block
        for group in distinct(behind // at_once).tolist():
            start = max(rest, group * at_once * per_block)
            count = (group + 1) * at_once * per_block - start
            for _, refcounts in stored_refcounts(self._image, self.blocks, 0, start, count):
                in_use += int(np.count_nonzero(refcounts))
        return in_use

    def _up_to(self, clusters: int) -> Refcounts:
        """Those of all *clusters*, and of more to the end of a block; none if that is too much."""
        length = round_up(clusters, refcounts_per_block(self._image.header))
        if length > _CLUSTERS_AT_ONCE:
            return np.empty(0, refcount_dtype(self._image.header))
        if self._beginning is None or len(self._beginning) != length:
            self._beginning = self._window(0, length)
        return self._beginning

    def _window(self, first: int, count: int) -> Refcounts:
        stored = np.zeros(count, refcount_dtype(self._image.header))
        for at, part in stored_refcounts(self._image, self.blocks, 0, first, count):
            stored[at : at + len(part)] = part
        return stored


def unpack_refcounts(data: bytes, refcount_order: int) -> Refcounts:
    """The refcounts in the bytes of refcount blocks, each ``1 << refcount_order`` bits wide.

    Widths of a byte and more are big-endian; of narrower ones the first is in the least
    significant bits of its byte (specification, "Refcount table and blocks").
    """
    if refcount_order >= 3:
        width = 1 << (refcount_order - 3)
        return np.frombuffer(data, dtype=f">u{width}").astype(f"u{width}")
    octets = np.frombuffer(data, dtype=np.uint8)
    bits = 1 << refcount_order
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (octets[:, np.newaxis] >> shifts) & np.uint8((1 << bits) - 1)
    return parts.reshape(-1)


def _table_part(image: Qcow2Image, start: int, end: int) -> U64Array:
    offset = image.header.refcount_table_offset + start * ENTRY_SIZE
    data = image.readable.read(offset, (end - start) * ENTRY_SIZE)
    return np.frombuffer(data, dtype=">u8").astype(np.uint64)


def _judge_entries(image: Qcow2Image, first_index: int, table: U64Array) -> None:
    cluster_size = image.header.cluster_size
    for bad, problem in (
        (table & np.uint64(RESERVED) != 0, "reserved bits are set"),
        (table % np.uint64(cluster_size) != 0, f"not aligned to clusters of {cluster_size} bytes"),
        (table >= np.uint64(image.readable.size), "not within the file"),
    ):
        if bad.any():
            index = int(np.argmax(bad))
            entry = int(table[index])
            raise BadRefcountTable(image.name, first_index + index, entry, problem)
