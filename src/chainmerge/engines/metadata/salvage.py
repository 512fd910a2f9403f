# SPDX-License-Identifier: Apache-2.0
"""An image read without what of it cannot be relied on: its refcounts, its bitmaps.

What the guest sees is said by the L1 and L2 tables alone, and everything else follows from
them. So an image whose refcounts are lost altogether, pointers to them included, can be
read, and its refcounts counted, as if it had an empty refcount table behind its end.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.rounding import divide_up
from chainmerge.engines.metadata.preconditions import readable_without_bitmaps
from chainmerge.qcow2.bitmaps import (
    TABLE_ALL_ONES,
    TABLE_ENTRY_SIZE,
    BitmapEntry,
    load_table,
    read_directory,
)
from chainmerge.qcow2.errors import FormatError
from chainmerge.qcow2.header import (
    MAX_CLUSTER_BITS,
    MAX_REFCOUNT_TABLE_BYTES,
    MIN_CLUSTER_BITS,
)
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import Readable
from chainmerge.qcow2.refcounts import (
    BLOCK_OFFSET_MASK,
    ENTRY_SIZE,
    StoredRefcounts,
    refcounts_per_block,
    unpack_refcounts,
)
from chainmerge.qcow2.references import Counts, Findings, count_references, is_about_copied
from chainmerge.qcow2.runs import NO_CLUSTERS, Clusters

if TYPE_CHECKING:
    from chainmerge.arithmetic.arrays import BoolArray

_REFCOUNT_TABLE_FIELD: Final = struct.Struct(">QI")
_REFCOUNT_TABLE_AT: Final = 48
_CLUSTER_BITS_AT: Final = 20


class Tables(Struct, frozen=True):
    """What an image uses, counted without its refcounts.

    Attributes:
        image: The image as it was read: its refcount table is an empty one.
        counts: How often each cluster of the file is used; refcount table and blocks are not.
        problems: What the tables that were read have wrong with them, in words; empty if
            they can be relied on.
    """

    image: Qcow2Image
    counts: Counts
    problems: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether a cluster with count 0 is not used by anything that was read."""
        return not self.problems


def tables_of(readable: Readable) -> Tables:
    """Read the mapping of the guest's disk and of internal snapshots, and nothing else.

    Raises:
        FormatError: the header is damaged in more than its refcount table.
    """
    return _counted(readable, readable_without_bitmaps(_without_refcounts(readable)))


def tables_with_bitmaps(readable: Readable) -> Tables:
    """As :func:`tables_of`, and the bitmaps if their autoclear bit vouches for them.

    Raises:
        FormatError: as :func:`tables_of`.
    """
    return _counted(readable, _without_refcounts(readable))


def image_without_refcounts(readable: Readable) -> Qcow2Image:
    """The image as if it had no refcounts; nothing is counted.

    Raises:
        FormatError: the header is damaged in more than its refcount table.
    """
    return Qcow2Image(_without_refcounts(readable))


def _counted(readable: Readable, masked: Readable) -> Tables:
    image = Qcow2Image(masked)
    findings = Findings()
    references = count_references(image, findings, StoredRefcounts(image))
    clusters = divide_up(readable.size, image.header.cluster_size)
    # Without refcounts no COPIED flag is right.
    wrong = findings.corruptions - findings.copied_mismatches + findings.overlaps
    problems: tuple[str, ...] = ()
    if wrong or not findings.complete:
        problems = tuple(one for one in findings.messages if not is_about_copied(one))
        problems = problems or ("its tables contradict themselves",)
    return Tables(image, references.counts[:clusters], problems)


def _without_refcounts(readable: Readable) -> _Overlaid:
    bits = int.from_bytes(readable.read(_CLUSTER_BITS_AT, 4))
    if not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
        # The header is damaged in more than that, which is for its parser to say.
        return _Overlaid(readable, readable.size, ())
    end = divide_up(readable.size, 1 << bits) << bits
    field = _REFCOUNT_TABLE_FIELD.pack(end, 1)
    return _Overlaid(readable, end + (1 << bits), ((_REFCOUNT_TABLE_AT, field),))


class _Overlaid(Struct, frozen=True):
    """A file of another size, with a few bytes of it read as others."""

    file: Readable
    size: int
    masks: tuple[tuple[int, bytes], ...]

    @property
    def name(self) -> str:
        return self.file.name

    def read(self, offset: int, length: int) -> bytes:
        data = self.file.read(offset, length)
        for at, mask in self.masks:
            low, high = max(at, offset), min(at + len(mask), offset + length)
            if low < high:
                part = mask[low - at : high - at]
                data = data[: low - offset] + part + data[high - offset :]
        return data


def clusters_of_bitmap(image: Qcow2Image, entry: BitmapEntry) -> Clusters | None:
    """Clusters of a bitmap's table and of its bits; None if its table cannot be read."""
    cluster_size = image.header.cluster_size
    try:
        offsets = load_table(image, entry)
    except FormatError:
        return None
    stored = offsets[offsets > TABLE_ALL_ONES] // np.uint64(cluster_size)
    first = entry.table_offset // cluster_size
    end = divide_up(entry.table_offset + entry.table_size * TABLE_ENTRY_SIZE, cluster_size)
    return np.concatenate([np.arange(first, end, dtype=np.int64), stored.astype(np.int64)])


def directory_clusters(image: Qcow2Image) -> Clusters:
    """Clusters of the bitmap directory that the file has, wherever the header says it is."""
    extension = image.header.bitmaps
    if extension is None:
        return NO_CLUSTERS
    size = image.header.cluster_size
    end = min(extension.directory_offset + extension.directory_size, image.readable.size)
    return np.arange(extension.directory_offset // size, divide_up(end, size), dtype=np.int64)


class OldRefcounts(Struct, frozen=True):
    """What the header, and the table that it names, take for refcounts.

    Nothing says that they are. But until new ones are in effect they may be all that there is.

    Attributes:
        table: Clusters of the table, as far as the file has them.
        index: Positions in the table of its blocks, those that are in the file.
        block: The cluster of each.
    """

    table: Clusters
    index: Clusters
    block: Clusters


def old_refcounts(readable: Readable, cluster_size: int) -> OldRefcounts:
    """Find what an image has for refcounts."""
    fields = readable.read(_REFCOUNT_TABLE_AT, _REFCOUNT_TABLE_FIELD.size)
    offset, clusters = _REFCOUNT_TABLE_FIELD.unpack(fields)
    length = min(clusters * cluster_size, MAX_REFCOUNT_TABLE_BYTES)
    if offset >= readable.size or offset % ENTRY_SIZE:
        return OldRefcounts(NO_CLUSTERS, NO_CLUSTERS, NO_CLUSTERS)
    entries = np.frombuffer(readable.read(offset, length), ">u8").astype(np.uint64)
    offsets = entries & np.uint64(BLOCK_OFFSET_MASK)
    index = np.flatnonzero((offsets != 0) & (offsets < np.uint64(readable.size)))
    own = np.arange(
        offset // cluster_size, divide_up(offset + length, cluster_size), dtype=np.int64
    )
    return OldRefcounts(
        own[own < divide_up(readable.size, cluster_size)],
        index.astype(np.int64),
        (offsets[index] // np.uint64(cluster_size)).astype(np.int64),
    )


def overwritten_metadata(readable: Readable, tables: Tables) -> tuple[str, ...]:
    """Why it is the guest's tables that are wrong where they lead to other metadata.

    Where they lead to a refcount block, the pointer to the block may be wrong or they are. It
    is they where the block counts what is in use. So it is where the bitmap directory makes
    sense: a guest's data does not happen to be one.
    """
    header = tables.image.header
    old = old_refcounts(readable, header.cluster_size)
    problems = []
    are_real = _count_what_is_used(readable, tables, old)
    if are_real[tables.counts[old.block] != 0].any():
        problems.append("the guest's tables point to where refcount blocks are")
    if are_real.any() and tables.counts[old.table].any():
        problems.append("the guest's tables point to where the refcount table is")
    clusters = directory_clusters(tables.image)
    clusters = clusters[clusters < len(tables.counts)]
    if tables.counts[clusters].any() and _makes_sense(tables.image):
        problems.append("the guest's tables point to where the bitmap directory is")
    return tuple(problems)


def _makes_sense(image: Qcow2Image) -> bool:
    try:
        return bool(read_directory(image))
    except FormatError:
        return False


def _count_what_is_used(readable: Readable, tables: Tables, old: OldRefcounts) -> BoolArray:
    """Which of the old refcount blocks count, except for a tenth, what the tables use."""
    header = tables.image.header
    entries = refcounts_per_block(header)
    real = np.zeros(len(old.index), np.bool_)
    for number, (index, block) in enumerate(
        zip(old.index.tolist(), old.block.tolist(), strict=True)
    ):
        counts = tables.counts[index * entries : (index + 1) * entries]
        used = np.flatnonzero(counts)
        if len(used):
            data = readable.read(block * header.cluster_size, header.cluster_size)
            stored = unpack_refcounts(data, header.refcount_order)[used]
            real[number] = np.count_nonzero(stored == counts[used]) >= 0.9 * len(used)
    return real
