# SPDX-License-Identifier: Apache-2.0
"""The bitmaps that images of a domain have on disk, as a VM would tell of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.bitmaps.rules import BitmapState
from chainmerge.bitmaps.stored import state_of
from chainmerge.live.nodes import NodeBitmap
from chainmerge.qcow2.bitmaps import read_bits, read_directory
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.storage.files import FileReadable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.live.nodes import BlockNode
    from chainmerge.qcow2.bitmaps import BitmapEntry


def stored_entries(node: BlockNode) -> list[BitmapEntry]:
    """The bitmaps that an image has on disk."""
    if node.filename is None or node.driver != "qcow2":
        return []
    with FileReadable(node.filename) as readable:
        return list(read_directory(Qcow2Image(readable)))


def stored_bitmaps(node: BlockNode) -> Iterator[NodeBitmap]:
    """The same, with how much of each is dirty."""
    if node.filename is None:
        return
    with FileReadable(node.filename) as readable:
        image = Qcow2Image(readable)
        for entry in read_directory(image):
            state = state_of(image, entry)
            worthless = state is BitmapState.IN_USE
            yield NodeBitmap(
                name=entry.name,
                granularity=entry.granularity,
                dirty_bytes=None if worthless else read_bits(image, entry).dirty_bytes(),
                recording=state is BitmapState.VALID,
                persistent=True,
                inconsistent=worthless,
                busy=False,
            )
