# SPDX-License-Identifier: Apache-2.0
"""What a single entry of the L2 tables says: the plain reading of the rules, one step at a time.

Rules are those of :mod:`chainmerge.qcow2.mapping`, which reads whole tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from chainmerge.qcow2.errors import BadEntry, BadOffset
from chainmerge.qcow2.extents import Kind, Mapping
from chainmerge.qcow2.header import SECTOR, SUBCLUSTERS
from chainmerge.qcow2.mapping import (
    ALL_ALLOCATED,
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    ZERO_FLAG,
)

if TYPE_CHECKING:
    from chainmerge.qcow2.header import Header
    from chainmerge.qcow2.image import Qcow2Image


def lookup(image: Qcow2Image, guest_offset: int) -> Mapping:
    """Decode the one L2 entry that maps *guest_offset*.

    Returns:
        The cluster, or the subcluster where L2 entries are extended, that holds
        *guest_offset*, cut at the disk's end; always a whole cluster if it is compressed.

    Raises:
        ValueError: *guest_offset* is outside the guest's disk.
        BadOffset: the L2 table or the cluster is where it cannot be.
        BadEntry: the entry means nothing.
    """
    header = image.header
    if not 0 <= guest_offset < header.virtual_size:
        raise ValueError(f"{guest_offset} is outside a disk of {header.virtual_size} bytes")
    cluster = guest_offset // header.cluster_size
    subcluster = guest_offset % header.cluster_size // header.subcluster_size
    entry, bitmap = _read_entry(image, cluster)

    def mapping(kind: Kind, host: int = 0, csize: int = 0) -> Mapping:
        unit = header.cluster_size if kind is Kind.COMPRESSED else header.subcluster_size
        guest = guest_offset - guest_offset % unit
        length = min(unit, header.virtual_size - guest)
        return Mapping(guest, length, kind, host, csize)

    def refuse(problem: str) -> NoReturn:
        raise BadEntry(image.name, "L2", cluster * header.cluster_size, entry, problem)

    if entry & COMPRESSED:
        if bitmap:
            refuse("a compressed cluster with subclusters")
        if header.external_data_file:
            refuse("a compressed cluster in an image with an external data file")
        return mapping(Kind.COMPRESSED, *_compressed_data(header, entry))

    if entry & L2_RESERVED:
        refuse("reserved bits are set")
    offset = entry & OFFSET_MASK
    if offset % header.cluster_size:
        problem = f"is not aligned to clusters of {header.cluster_size} bytes"
        raise BadOffset(image.name, "data cluster", offset, problem)
    has_host = offset != 0 or bool(header.external_data_file and entry & COPIED)
    if header.external_data_file and has_host and offset != cluster * header.cluster_size:
        refuse("not at its guest offset in the external data file")

    contradiction = _contradiction(header, entry, bitmap, has_host=has_host)
    if contradiction is not None:
        refuse(contradiction)
    if header.extended_l2:
        zero = bool(bitmap >> SUBCLUSTERS >> subcluster & 1)
        data = bool(bitmap >> subcluster & 1)
    else:
        zero = bool(entry & ZERO_FLAG)
        data = has_host
    host = offset + subcluster * header.subcluster_size
    if zero:
        return mapping(Kind.ZERO_ALLOCATED, host) if has_host else mapping(Kind.ZERO)
    return mapping(Kind.DATA, host) if data else mapping(Kind.UNALLOCATED)


def _compressed_data(header: Header, entry: int) -> tuple[int, int]:
    """Where a compressed cluster begins in the file, and its length: whole sectors, in bytes."""
    offset_bits = 70 - header.cluster_bits
    host = entry % (1 << offset_bits)
    sectors = (entry % COMPRESSED >> offset_bits) + 1
    return host, sectors * SECTOR - host % SECTOR


def _contradiction(header: Header, entry: int, bitmap: int, *, has_host: bool) -> str | None:
    """What of a standard entry, or of its subclusters, cannot be true together."""
    if not header.extended_l2:
        if entry & ZERO_FLAG and header.version < 3:
            return "a zero flag in an image of version 2"
        return None
    if entry & ZERO_FLAG:
        return "a zero flag in an extended entry"
    if bitmap >> SUBCLUSTERS & bitmap:
        return "subclusters are both allocated and zero"
    if not has_host and bitmap & ALL_ALLOCATED:
        return "subclusters are allocated in a cluster that is not"
    return None


def _read_entry(image: Qcow2Image, cluster: int) -> tuple[int, int]:
    """The L2 entry of a guest cluster and its subcluster bitmap, both 0 if there is none."""
    header = image.header
    index, within = divmod(cluster, header.l2_entries)
    l1_entry = int(image.read_l1(index, index + 1)[0])
    if l1_entry & L1_RESERVED:
        guest = index * header.l2_entries * header.cluster_size
        raise BadEntry(image.name, "L1", guest, l1_entry, "reserved bits are set")
    table = l1_entry & OFFSET_MASK
    if not table:
        return 0, 0
    if table % header.cluster_size:
        problem = f"is not aligned to clusters of {header.cluster_size} bytes"
        raise BadOffset(image.name, "L2 table", table, problem)
    if table + header.cluster_size > image.readable.size:
        problem = f"is not within the file of {image.readable.size} bytes"
        raise BadOffset(image.name, "L2 table", table, problem)
    data = image.readable.read(table + within * header.l2_entry_size, header.l2_entry_size)
    words = [int.from_bytes(data[at : at + 8], "big") for at in range(0, len(data), 8)]
    return words[0], words[1] if header.extended_l2 else 0
