# SPDX-License-Identifier: Apache-2.0
"""Whether leaked clusters look like the data that a lost L2 table mapped.

An L2 table that was overwritten with zeros, or whose L1 entry was, contradicts nothing: to a
check, the guest has no data there, and the clusters that the table led to are leaked. They are
then the only copy of what the guest had. A writer that was killed leaves such clusters, too
(QEMU allocates and writes a cluster before it stores the entry that leads to it), so this is a
judgement, made from as little as can be read quickly:

- an L2 table of nothing but zeros, and leaked clusters that hold data;
- a leaked cluster that can be read as an L2 table of which every entry leads to a leaked cluster;
- an L1 entry that leads to no table, and a number of leaked clusters that hold data.

Clusters of zeros hold nothing that could be lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from msgspec import Struct

from chainmerge.arithmetic.distinct import distinct
from chainmerge.qcow2.gather import read_pieces
from chainmerge.qcow2.mapping import COMPRESSED, COPIED, OFFSET_MASK, compressed_place

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.arithmetic.arrays import U64Array
    from chainmerge.qcow2.image import Qcow2Image
    from chainmerge.qcow2.runs import Clusters, Runs

# So few clusters of data are left by any writer that dies.
_A_NUMBER: Final = 16
_LOOKED_AT: Final = 1024
_READ_OF_CLUSTERS: Final = 64 << 20
_READ_OF_TABLES: Final = 256 << 20
_READ_AT_ONCE: Final = 4 << 20
# Bits of a standard cluster descriptor that are 0: 1 to 8 and 56 to 61.
_RESERVED: Final = 0x3F00_0000_0000_01FE


class Sign(Struct, frozen=True):
    """What makes leaked clusters look like the content of a lost L2 table.

    Attributes:
        clause: That, in words.
        is_plain: Whether hardly anything but a lost table explains it.
    """

    clause: str
    is_plain: bool


def sign_of_lost_table(image: Qcow2Image, leaked: Runs) -> Sign | None:
    """What makes *leaked* clusters look like the content of a lost L2 table; None if nothing.

    The image's tables are sound. Reads at most 320 MiB, and mostly
    nothing: nothing is asked where nothing is leaked.
    """
    if not len(leaked.start):
        return None
    looked_at = with_data = 0
    sample = _sample(image, leaked)
    for cluster, content in _contents(image, sample):
        looked_at += 1
        if not content.any():
            continue
        with_data += 1
        entries = _entries_leading_to(image, content, leaked)
        if entries:
            at = cluster * image.header.cluster_size
            clause = f"the one at byte {at} can be read as an L2 table that maps {entries} of them"
            return Sign(clause, is_plain=True)
    if not with_data:
        return None
    wiped = _table_of_zeros(image)
    if wiped is not None:
        clause = f"some hold data, and {_guest_range(image, wiped)} has an L2 table of zeros"
        return Sign(clause, is_plain=True)
    used = image.read_l1(0, image.header.l1_entries_used)
    unmapped = np.flatnonzero(used & np.uint64(OFFSET_MASK) == 0)
    likely = with_data * leaked.total // looked_at
    if likely < _A_NUMBER or not len(unmapped):
        return None
    clause = (
        f"about {likely} of them hold data, and {_guest_range(image, int(unmapped[0]))} has no "
        "L2 table"
    )
    return Sign(clause, is_plain=False)


def _sample(image: Qcow2Image, leaked: Runs) -> Clusters:
    """Some of the leaked clusters, ascending; all of them where they are few.

    The first ones of ranges: QEMU allocates a table right before what it leads to.
    """
    most = max(1, min(_LOOKED_AT, _READ_OF_CLUSTERS // image.header.cluster_size))
    total = leaked.total
    before = np.cumsum(leaked.length) - leaked.length
    numbers = np.linspace(0, total - 1, num=min(most, total), dtype=np.int64)
    at = np.searchsorted(before, numbers, "right") - 1
    spread = leaked.start[at] + numbers - before[at]
    return distinct(np.concatenate([spread, leaked.start[: max(1, most // 2)]]))


def _contents(image: Qcow2Image, clusters: Clusters) -> Iterator[tuple[int, U64Array]]:
    """Each of the clusters with the numbers that it consists of, zeros behind the file's end."""
    size, readable = image.header.cluster_size, image.readable
    at_once = max(1, _READ_AT_ONCE // size)
    for start in range(0, len(clusters), at_once):
        part = clusters[start : start + at_once]
        whole = part[(part + 1) * size <= readable.size]
        data = read_pieces(readable, whole.astype(np.uint64) * np.uint64(size), size)
        words = np.frombuffer(data, ">u8").reshape(len(whole), -1)
        yield from zip(whole.tolist(), words, strict=True)
        for cluster in part[len(whole) :].tolist():
            rest = readable.read(cluster * size, max(0, readable.size - cluster * size))
            yield cluster, np.frombuffer(rest.ljust(size, b"\0"), ">u8")


def _entries_leading_to(image: Qcow2Image, content: U64Array, leaked: Runs) -> int:
    """How many entries a table has; 0 if *content* is none that leads to leaked clusters only."""
    header = image.header
    if header.external_data_file:
        return 0
    words = content[::2] if header.extended_l2 else content
    entries = words[words != 0].astype(np.uint64)
    packed = entries & np.uint64(COMPRESSED) != 0
    plain = entries[~packed]
    offsets = plain & np.uint64(OFFSET_MASK)
    if (plain & np.uint64(_RESERVED)).any() or (offsets % np.uint64(header.cluster_size)).any():
        return 0
    if not packed.any() and not (plain & np.uint64(COPIED)).any():
        # Tables of bitmaps look alike, except for that.
        return 0
    hosts = offsets[offsets != 0]
    if packed.any():
        hosts = np.concatenate([hosts, compressed_place(header, entries[packed])[0]])
    clusters = (hosts >> np.uint64(header.cluster_bits)).astype(np.int64)
    at = np.searchsorted(leaked.start, clusters, "right") - 1
    end = leaked.end
    return len(clusters) if bool(((at >= 0) & (clusters < end[at])).all()) else 0


def _table_of_zeros(image: Qcow2Image) -> int | None:
    """The number of an L1 entry that leads to an L2 table of zeros; None if none was found."""
    header = image.header
    at_once = max(1, _READ_AT_ONCE // header.cluster_size)
    most = max(1, _READ_OF_TABLES // header.cluster_size)
    looked_at = 0
    for first in range(0, header.l1_entries_used, at_once):
        tables = image.read_l1(first, min(first + at_once, header.l1_entries_used))
        tables &= np.uint64(OFFSET_MASK)
        present = np.flatnonzero(tables)
        data = read_pieces(image.readable, tables[present], header.cluster_size)
        words = np.frombuffer(data, ">u8").reshape(len(present), -1)
        empty = np.flatnonzero(~words.any(axis=1))
        if len(empty):
            return first + int(present[empty[0]])
        looked_at += len(present)
        if looked_at >= most:
            break
    return None


def _guest_range(image: Qcow2Image, l1_index: int) -> str:
    header = image.header
    span = header.l2_entries * header.cluster_size
    start = l1_index * span
    return f"the guest's disk from byte {start} to {min(start + span, header.virtual_size)}"
