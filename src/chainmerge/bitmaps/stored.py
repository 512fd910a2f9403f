# SPDX-License-Identifier: Apache-2.0
"""Reads images back for the reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.bitmaps.rules import BitmapState
from chainmerge.documents.merge import BitmapResult
from chainmerge.qcow2.bitmaps import BitmapEntry, read_bits, read_directory

if TYPE_CHECKING:
    from chainmerge.qcow2.image import Qcow2Image


def verified_before(source: str, target: str) -> str:
    """What a report says of an image whose data an earlier run took to another one."""
    return f"an earlier run merged {source} into {target} and verified it"


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

    Raises FormatError where they cannot be read.
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
