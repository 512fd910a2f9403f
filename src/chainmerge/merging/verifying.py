# SPDX-License-Identifier: Apache-2.0
"""Verifies what a merge has written, from the closed image and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainmerge.arithmetic.counting import counted
from chainmerge.bitmaps.comparing import bitmap_difference, bitmap_shortfall
from chainmerge.chain.comparing import first_difference
from chainmerge.merging.errors import VerificationFailed
from chainmerge.qcow2.bitmaps import read_bits, read_directory
from chainmerge.qcow2.check import check, check_with_references, compare_refcounts
from chainmerge.qcow2.runs import Runs, without_runs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainmerge.chain.view import GuestView
    from chainmerge.engines.metadata.bitmap_set import StoredBitmap
    from chainmerge.qcow2.check import CheckReport
    from chainmerge.qcow2.image import Qcow2Image
    from chainmerge.qcow2.references import ReferenceCounts


def verify_bitmaps(image: Qcow2Image, expected: Sequence[StoredBitmap]) -> str:
    """Compare an image's bitmaps with what was planned; returns a sentence for the report.

    Raises VerificationFailed.
    """
    difference = bitmap_difference(image, expected)
    if difference is not None:
        raise VerificationFailed(image.name, difference)
    return f"{counted(len(expected), 'bitmap')} re-read and compared bit by bit"


def verify_bitmaps_cover(image: Qcow2Image, expected: Sequence[StoredBitmap]) -> str:
    """Make sure that an image's bitmaps have all bits that were planned; a backup is not smaller.

    For merges by another program that lets bitmaps record what is merely copied.

    Raises VerificationFailed.
    """
    difference = bitmap_shortfall(image, expected)
    if difference is not None:
        raise VerificationFailed(image.name, difference)
    found = {entry.name: read_bits(image, entry).dirty_bytes() for entry in read_directory(image)}
    more = sum(found.values()) - sum(bitmap.bits.dirty_bytes() for bitmap in expected)
    surplus = f", with {counted(more, 'byte')} more than necessary" if more else ""
    return f"{counted(len(expected), 'bitmap')} re-read: every bit is there{surplus}"


def verify_soundness(image: Qcow2Image) -> ReferenceCounts:
    """Recompute the refcounts of an image that may still count clusters it no longer uses.

    Returns what its tables use. Raises VerificationFailed.
    """
    report, references = check_with_references(image)
    if not report.sound:
        first = next(iter(report.messages), "no details")
        corruptions = counted(report.corruptions, "corruption")
        raise VerificationFailed(image.name, f"{corruptions}: {first}")
    return references


def verify_metadata(image: Qcow2Image, kept: Runs) -> str:
    """Recompute an image's refcounts; returns a sentence for the report.

    *kept* are the clusters that were leaked before and stay so. Raises VerificationFailed.
    """
    return _verify_refcounts(image, check(image), kept)


def verify_refcounts(image: Qcow2Image, references: ReferenceCounts, kept: Runs) -> str:
    """As :func:`verify_metadata`, once :func:`verify_soundness` has counted the references."""
    return _verify_refcounts(image, compare_refcounts(image, references), kept)


def _verify_refcounts(image: Qcow2Image, report: CheckReport, kept: Runs) -> str:
    new = without_runs(report.leaked, kept).total
    if not report.sound or new > report.shared_leaks:
        first = next(iter(report.messages), "no details")
        found = f"{counted(report.corruptions, 'corruption')}, {counted(new, 'leak')}"
        raise VerificationFailed(image.name, f"{found}: {first}")
    if report.shared_leaks:
        return (
            "refcounts recomputed from the tables: no corruption; refcounts too high for "
            f"{counted(report.shared_leaks, 'cluster')}, as left by a QEMU killed while it wrote "
            "to an image with internal snapshots (`chainmerge repair` lowers them)"
        )
    if report.leaks > new:
        return (
            "refcounts recomputed from the tables: no corruption, no leaks except "
            f"{counted(report.leaks - new, 'cluster')} leaked before"
        )
    return "refcounts recomputed from the tables: no corruption, no leaks"


def verify_content(
    image: str,
    merged: GuestView,
    expected: GuestView,
    progress: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> str:
    """Compare base's guest-visible content with top's view; returns a sentence for the report.

    Raises VerificationFailed, Interrupted.
    """
    size = expected.virtual_size
    offset = first_difference(merged, expected, 0, size, progress=progress, should_stop=should_stop)
    if offset is not None:
        raise VerificationFailed(image, f"guest byte {offset} differs from what top shows")
    return f"content of all {size} guest bytes compared with what top shows"
