# SPDX-License-Identifier: Apache-2.0
"""Bitmaps in tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.arithmetic.counting import counted
from chainmerge.report import layout
from chainmerge.report.layout import Block, Words, stack, words
from chainmerge.report.names import ImageNames, names_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from chainmerge.documents.bitmaps import (
        BitmapResult,
        BitmapRow,
        BitmapsRepairReport,
        UnusableBitmap,
    )


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


def bitmaps_repair_report(report: BitmapsRepairReport) -> Block:
    """Which bitmaps of a chain cannot be used, and that they go, or are gone."""
    unusable = report.unusable
    if not unusable:
        return words(f"{report.image}: no bitmap of its chain needs repair", layout.GOOD)
    names = names_in([report.image, *(image for one in unusable for image in one.images)])
    rows = (_unusable_row(one, names) for one in unusable)
    return stack(
        words(f"Unusable bitmaps in the chain of {report.image}", layout.TITLE),
        layout.indented(layout.listing(("name", "images", "why"), rows)),
        words(_outcome(report)),
        *_tombstone_lines(report, names),
        *layout.warnings_section(report.warnings),
    )


def _unusable_row(one: UnusableBitmap, names: ImageNames) -> tuple[Words, ...]:
    return (
        words(one.name),
        words(names.of_all(one.images)),
        words(names.left_out_of(one.reason), layout.BAD),
    )


def _outcome(report: BitmapsRepairReport) -> str:
    what = counted(len(report.unusable), "bitmap")
    if report.dry_run:
        return (
            f"This drops {what} from all these images. The next backup must be a full one; then "
            "begin a new bitmap."
        )
    return (
        f"Dropped {what} from all these images. The next backup must be a full one; begin a new "
        "bitmap with it."
    )


def _tombstone_lines(report: BitmapsRepairReport, names: ImageNames) -> Iterator[Words]:
    for one in report.removed:
        if one.tombstone:
            yield words(
                f"{names.of(one.image)} keeps a tombstone for {one.name!r}, because images of "
                "other chains above it have the name.",
                layout.QUIET,
            )
