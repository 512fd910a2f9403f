# SPDX-License-Identifier: Apache-2.0
"""Whether the images that a merge only reads can be read, by QEMU and by ourselves.

Anything wrong with them must be found before the first write. Their refcounts do not
matter, as nothing is written to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chainmerge.arithmetic.rounding import round_up
from chainmerge.chain.layers import Layer, Qcow2Layer
from chainmerge.qcow2.bitmaps import read_table
from chainmerge.qcow2.errors import BadOffset
from chainmerge.qcow2.mapping import Kind
from chainmerge.qcow2.refcounts import require_refcount_blocks
from chainmerge.qcow2.snapshots import read_snapshots
from chainmerge.qcow2.table_errors import UnreadableBitmap

if TYPE_CHECKING:
    from chainmerge.chain.opening import OpenChain, OpenImage
    from chainmerge.chain.target import Target
    from chainmerge.chain.view import GuestView, Resolved


# Host offsets have 63 bits, so that no run reaches as far.
_ANYWHERE = (1 << 64) - 1


def require_readable(target: Target, opened: OpenChain) -> None:
    """Refuse a chain that QEMU would not open, or whose verification would fail to read it.

    Base's bitmaps are left out, as they are replaced before QEMU sees it; so is the data
    above base, which :func:`require_data_in_files` is for.

    Raises:
        FormatError: an image is damaged.
    """
    for index, image in enumerate(opened.images):
        _require_tables(image)
        if index != target.base_index:
            _require_bitmaps(image)
    if target.base_index:
        below = opened.view(0, target.base_index)
        for runs in below.resolve():
            require_data_in_files(below, runs)


def require_data_in_files(view: GuestView, runs: Resolved) -> None:
    """Refuse *runs* of *view* that have data where their file has ended already.

    QEMU reads zeros there, so that a file that was cut off passes for a sound one. The last
    cluster of a file need not be whole.

    Raises:
        BadOffset: data is outside its file.
    """
    ends = np.array([_end_of_clusters(layer) for layer in view.layers], np.uint64)
    end = ends[runs.layer]
    data = (runs.kind == Kind.DATA) & (runs.host + runs.length > end)
    compressed = (runs.kind == Kind.COMPRESSED) & (runs.host >= end)
    outside = np.flatnonzero(data | compressed)
    if len(outside):
        layer = view.layers[int(runs.layer[outside[0]])]
        problem = f"is not within the file of {layer.source.size} bytes"
        raise BadOffset(layer.name, "data", int(runs.host[outside[0]]), problem)


def _end_of_clusters(layer: Layer) -> int:
    """The end of the last cluster of which the image's file has anything, if that matters."""
    if not isinstance(layer, Qcow2Layer) or layer.image.header.external_data_file:
        return _ANYWHERE
    return round_up(layer.source.size, layer.cluster_size)


def _require_tables(opened: OpenImage) -> None:
    if opened.image is not None:
        require_refcount_blocks(opened.image)
        read_snapshots(opened.image)


def _require_bitmaps(opened: OpenImage) -> None:
    """QEMU reads all bitmaps of an image when it opens it, unless it does not trust any."""
    image = opened.image
    if image is None or not image.header.bitmaps_trusted:
        return
    for entry in opened.info.bitmaps:
        if entry.unknown:
            raise UnreadableBitmap(image.name, entry.name, entry.unknown)
        if not entry.in_use:
            read_table(image, entry)
