# SPDX-License-Identifier: Apache-2.0
"""Bitmaps in tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.report import layout
from chainmerge.report.layout import Block, Words, words

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chainmerge.documents.bitmaps import BitmapResult, BitmapRow


def held_bitmaps(bitmaps: tuple[BitmapResult, ...]) -> Block:
    """Return the bitmaps that an image holds as a table."""
    return bitmap_table(bitmaps) if bitmaps else words("none", layout.QUIET)


def bitmap_table(bitmaps: Iterable[BitmapResult | BitmapRow]) -> Block:
    """Return bitmaps as a table."""
    table = layout.listing(
        ("name", "state", "granularity", "dirty", "bytes"),
        map(_bitmap_row, bitmaps),
        right=("granularity", "dirty", "bytes"),
    )
    return layout.indented(table)


def _bitmap_row(bitmap: BitmapResult | BitmapRow) -> tuple[Words, ...]:
    # Beside the name of the flag in the image stands what QEMU calls such a bitmap.
    state = f"{bitmap.state} (inconsistent)" if bitmap.state == "in-use" else bitmap.state
    state = f"{state} (tombstone)" if bitmap.tombstone else state
    return (
        words(bitmap.name),
        words(state, layout.STATE_STYLES.get(bitmap.state, "")),
        layout.size(bitmap.granularity),
        layout.size(bitmap.dirty_bytes),
        layout.number(bitmap.dirty_bytes),
    )
