# SPDX-License-Identifier: Apache-2.0
"""What the images of a chain hold: data that is seen, data that is hidden, and what describes it.

Counted from the tables, an image at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from chainmerge.arithmetic.distinct import distinct
from chainmerge.arithmetic.rounding import divide_up
from chainmerge.chain.information import on_disk
from chainmerge.documents.chain_pictures import LayerSpace
from chainmerge.engines.metadata.old_tree import bitmap_clusters
from chainmerge.inventory.gain import stored_in
from chainmerge.qcow2.mapping import OFFSET_MASK
from chainmerge.qcow2.refcounts import read_refcount_table

if TYPE_CHECKING:
    from chainmerge.chain.opening import OpenImage
    from chainmerge.qcow2.image import Qcow2Image

_L1_ENTRY: Final = 8
_L1_ENTRIES_AT_ONCE: Final = 1 << 17


def layer_space(opened: OpenImage, path: str, visible_bytes: int) -> LayerSpace:
    """What one image of a chain holds.

    Args:
        opened: the image.
        path: what it is called.
        visible_bytes: how much of its data the chain shows.

    Raises:
        FormatError: tables are damaged.
    """
    image = opened.image
    return LayerSpace(
        path=path,
        format=opened.info.format,
        file_size=opened.info.file_size,
        occupied_bytes=on_disk(opened.info)[0],
        visible_bytes=visible_bytes,
        hidden_bytes=max(0, stored_in(opened.layer) - visible_bytes),
        metadata_bytes=0 if image is None else _metadata_bytes(image),
        bitmap_bytes=0 if image is None else _bitmap_bytes(image),
    )


def _metadata_bytes(image: Qcow2Image) -> int:
    header = image.header
    blocks = int(np.count_nonzero(read_refcount_table(image)))
    clusters = (
        1  # the header's
        + divide_up(header.l1_size * _L1_ENTRY, header.cluster_size)
        + _l2_tables(image)
        + header.refcount_table_clusters
        + blocks
    )
    return clusters * header.cluster_size


def _l2_tables(image: Qcow2Image) -> int:
    return sum(
        int(np.count_nonzero(image.read_l1(at, at + _L1_ENTRIES_AT_ONCE) & np.uint64(OFFSET_MASK)))
        for at in range(0, image.header.l1_size, _L1_ENTRIES_AT_ONCE)
    )


def _bitmap_bytes(image: Qcow2Image) -> int:
    return len(distinct(bitmap_clusters(image))) * image.header.cluster_size
