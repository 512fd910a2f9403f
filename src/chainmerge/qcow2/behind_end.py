# SPDX-License-Identifier: Apache-2.0
"""What an image stores behind the end of its disk, and what shows once the disk is larger.

The last cluster reaches behind the end where the disk's size is not a multiple of the cluster
size. What it holds there is the content of a larger disk that was made smaller (``qemu-img resize
--shrink`` frees whole clusters only), or whatever a program left. Nobody sees it until the end is
moved: QEMU writes another size into the header and leaves the cluster as it is, unless a longer
backing file is to be hidden (``qcow2_co_truncate``, QEMU 7.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from chainmerge.arithmetic.rounding import round_up
from chainmerge.qcow2.compression import decompress_cluster
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.mapping import Kind, iter_extents
from chainmerge.qcow2.refcounts import read_refcounts

if TYPE_CHECKING:
    from chainmerge.qcow2.extents import Extents
    from chainmerge.qcow2.readable import Readable


class OldBytes(Struct, frozen=True):
    """What would become visible.

    Attributes:
        places: Offset and length, in the file that holds the data, of what is not all zeros.
        obstacle: Why that cannot be known, or not be made zeros where it is; None if it can.
    """

    places: tuple[tuple[int, int], ...] = ()
    obstacle: str | None = None

    @property
    def anything(self) -> bool:
        """Whether a larger disk would show it."""
        return bool(self.places) or self.obstacle is not None


class _Enlarged(Qcow2Image):
    """An image as it is once somebody has moved the end of its disk."""

    def __init__(self, image: Qcow2Image, size: int) -> None:
        self._readable = image.readable
        self._header = replace(image.header, virtual_size=size)


def old_bytes(image: Qcow2Image, data: Readable, size_after: int) -> OldBytes:
    """Look at what *image* stores from the end of its disk to guest byte *size_after*.

    Reads the last cluster, and the entries behind it up to the first one that is in use.

    Args:
        image: The image.
        data: Its own file, or its external data file.
        size_after: Bytes of the larger disk.

    Raises:
        FormatError: its tables are damaged, or the compressed data of its last cluster.
    """
    header = image.header
    end = header.virtual_size
    if size_after <= end:
        return OldBytes()
    cluster_end = round_up(end, header.cluster_size)
    # QEMU grows the L1 table by entries of zeros.
    mapped = header.l1_size * header.l2_entries * header.cluster_size
    upto = min(round_up(size_after, header.cluster_size), max(mapped, cluster_end))
    places: list[tuple[int, int]] = []
    for extents in iter_extents(_Enlarged(image, upto), end, upto):
        stored = (extents.kind == Kind.DATA) | (extents.kind == Kind.COMPRESSED)
        for index in np.flatnonzero(stored).tolist():
            if int(extents.guest[index] + extents.length[index]) > cluster_end:
                return OldBytes(obstacle="its tables map clusters behind the end of its disk")
            obstacle = _obstacle(image, extents, index)
            if obstacle is not None:
                return OldBytes(obstacle=obstacle)
            if extents.kind[index] == Kind.DATA:
                places.append((int(extents.host[index]), int(extents.length[index])))
    found = tuple(place for place in places if _holds_anything(data, *place))
    if found and _is_shared(image, found[0][0]):
        return OldBytes(obstacle="it ends inside a cluster that something else uses too")
    return OldBytes(found)


def _obstacle(image: Qcow2Image, extents: Extents, index: int) -> str | None:
    """The part of the last cluster that is not zeros, and cannot be made zeros in place."""
    if image.header.encrypted:
        return "it ends inside a cluster whose rest is encrypted"
    if extents.kind[index] != Kind.COMPRESSED:
        return None
    host = int(extents.host[index])
    packed = image.readable.read(host, int(extents.csize[index]))
    within = int(extents.guest[index]) % image.header.cluster_size
    if any(decompress_cluster(image, host, packed)[within:]):
        return "it ends inside a compressed cluster whose rest is not zeros"
    return None


def _holds_anything(data: Readable, offset: int, length: int) -> bool:
    return any(data.read(offset, max(0, min(length, data.size - offset))))


def _is_shared(image: Qcow2Image, offset: int) -> bool:
    """Whether a snapshot uses the cluster. Images with external data files have none."""
    header = image.header
    if header.external_data_file:
        return False
    return bool((read_refcounts(image, offset >> header.cluster_bits, 1) != 1).any())
