# SPDX-License-Identifier: Apache-2.0
"""The bitmaps that an image stores, as the rules and the reports see them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chainmerge.bitmaps.rules import BitmapState, LayerBitmaps, Occurrence
from chainmerge.documents.bitmaps import BitmapResult
from chainmerge.qcow2.bitmaps import BitmapEntry, read_bits, read_directory, read_table

if TYPE_CHECKING:
    from chainmerge.chain.opening import OpenImage
    from chainmerge.qcow2.image import Qcow2Image


def bitmaps_of(opened: OpenImage) -> LayerBitmaps:
    """The bitmaps of one image as the rules see them."""
    image = opened.image
    occurrences = {
        entry.name: Occurrence(
            state := state_of(image, entry),
            entry.granularity,
            _is_empty(opened, entry) if state is BitmapState.DISABLED else None,
        )
        for entry in opened.info.bitmaps
        if image is not None
    }
    return LayerBitmaps(str(opened.info.path), occurrences, opened.info.supports_bitmaps)


def _is_empty(opened: OpenImage, entry: BitmapEntry) -> bool:
    assert opened.image is not None
    return not np.any(read_table(opened.image, entry))


def state_of(image: Qcow2Image, entry: BitmapEntry) -> BitmapState:
    """The state of a stored bitmap.

    All bitmaps of an image whose last writer did not know of them count as in-use, and so
    does one that asks for features nobody knows (qcow2 specification, "Bitmaps extension").
    """
    if entry.in_use or not image.header.bitmaps_trusted or not entry.readable:
        return BitmapState.IN_USE
    return BitmapState.VALID if entry.auto else BitmapState.DISABLED


def bitmap_results(image: Qcow2Image) -> tuple[BitmapResult, ...]:
    """Every bitmap of an image, in the order of their names.

    Raises FormatError if they cannot be read.
    """
    entries = sorted(read_directory(image), key=lambda entry: entry.name)
    return tuple(_result(image, entry) for entry in entries)


def _result(image: Qcow2Image, entry: BitmapEntry) -> BitmapResult:
    state = state_of(image, entry)
    dirty = None if state is BitmapState.IN_USE else read_bits(image, entry).dirty_bytes()
    return BitmapResult(
        name=entry.name,
        state=state,
        granularity=entry.granularity,
        dirty_bytes=dirty,
        tombstone=state is BitmapState.DISABLED and dirty == 0,
    )
