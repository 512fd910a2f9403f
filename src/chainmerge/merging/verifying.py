# SPDX-License-Identifier: Apache-2.0
"""Looks at what a merge has written, from the closed image, and believes nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from chainmerge.chain.view import GuestView, first_difference
from chainmerge.engines.metadata.allocation import Runs, without_runs
from chainmerge.errors import Failed
from chainmerge.qcow2.bitmaps import BitmapEntry, BitmapFlag, read_bits, read_directory
from chainmerge.qcow2.check import check

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainmerge.engines.metadata import StoredBitmap
    from chainmerge.qcow2.bits import BitSet
    from chainmerge.qcow2.image import Qcow2Image

# How the bits found differ from those that were planned; None where they do not.
_BitsDiffer: TypeAlias = "Callable[[BitSet, BitSet], str | None]"


@dataclass(eq=False)
class VerificationFailed(Failed):
    """What was written is not what was planned."""

    code: ClassVar[str] = "verification-failed"
    template: ClassVar[str] = "{image} is not as planned after the merge: {difference}"
    hint: ClassVar[str] = (
        "the overlays were not changed and still give the right content: keep them, do not use "
        "{image} alone, look at the storage below it, and run the same command again"
    )
    explanation: ClassVar[str] = (
        "After a merge the image is read back: its refcounts are recomputed, its bitmaps compared "
        "bit by bit with what was planned, its content with what the overlays show. One of these "
        "did not agree. Nothing was deleted or re-pointed. The same command does the whole work "
        "again; if it fails again, suspect the storage."
    )
    image: str
    difference: str


def bitmap_difference(image: Qcow2Image, expected: Sequence[StoredBitmap]) -> str | None:
    """How an image's bitmaps differ from the expected set; None if they do not.

    Raises FormatError where they cannot be read.
    """
    return _set_difference(image, expected, _bits_differ)


def _set_difference(
    image: Qcow2Image, expected: Sequence[StoredBitmap], bits_differ: _BitsDiffer
) -> str | None:
    entries = {entry.name: entry for entry in read_directory(image)}
    if entries and not image.header.bitmaps_trusted:
        return "its bitmaps are not marked as consistent"
    wanted = {bitmap.name: bitmap for bitmap in expected}
    for name in sorted(wanted.keys() | entries.keys()):
        if name not in entries:
            return f"bitmap {name!r} is missing"
        if name not in wanted:
            return f"bitmap {name!r} should not be there"
        difference = _one_difference(image, entries[name], wanted[name], bits_differ)
        if difference is not None:
            return f"bitmap {name!r} {difference}"
    return None


def _one_difference(
    image: Qcow2Image, entry: BitmapEntry, wanted: StoredBitmap, bits_differ: _BitsDiffer
) -> str | None:
    if entry.in_use or not entry.readable:
        return "is in-use: it was not stored properly"
    if entry.auto != bool(wanted.flags & BitmapFlag.AUTO):
        return "is enabled" if entry.auto else "is disabled"
    if entry.granularity != wanted.bits.granularity:
        return f"has granularity {entry.granularity}, not {wanted.bits.granularity}"
    return bits_differ(read_bits(image, entry), wanted.bits)


def _bits_differ(found: BitSet, wanted: BitSet) -> str | None:
    if found == wanted:
        return None
    return f"has {found.count()} dirty bits, not the {wanted.count()} planned, or others"


def _bits_lack(found: BitSet, wanted: BitSet) -> str | None:
    if found.covers(wanted):
        return None
    return f"has {found.count()} dirty bits and lacks some of the {wanted.count()} planned"


def verify_bitmaps(image: Qcow2Image, expected: Sequence[StoredBitmap]) -> str:
    """Compare an image's bitmaps with what was planned; returns a sentence for the report.

    Raises VerificationFailed.
    """
    difference = bitmap_difference(image, expected)
    if difference is not None:
        raise VerificationFailed(image.name, difference)
    return f"{len(expected)} bitmaps re-read and compared bit by bit"


def verify_bitmaps_cover(image: Qcow2Image, expected: Sequence[StoredBitmap]) -> str:
    """Make sure that an image's bitmaps have all bits that were planned; a backup is not smaller.

    For merges that somebody else does, who lets bitmaps record what is merely copied.

    Raises VerificationFailed.
    """
    difference = _set_difference(image, expected, _bits_lack)
    if difference is not None:
        raise VerificationFailed(image.name, difference)
    found = {entry.name: read_bits(image, entry).dirty_bytes() for entry in read_directory(image)}
    more = sum(found.values()) - sum(bitmap.bits.dirty_bytes() for bitmap in expected)
    surplus = f", with {more} bytes more than need be" if more else ""
    return f"{len(expected)} bitmaps re-read: every bit is there{surplus}"


def verify_soundness(image: Qcow2Image) -> None:
    """Recompute the refcounts of an image that may still count what it does not use any more.

    Raises VerificationFailed.
    """
    report = check(image)
    if not report.sound:
        first = next(iter(report.messages), "no details")
        raise VerificationFailed(image.name, f"{report.corruptions} corruptions: {first}")


def verify_metadata(image: Qcow2Image, kept: Runs) -> str:
    """Recompute an image's refcounts; returns a sentence for the report.

    *kept* are the clusters that were leaked before and stay so. Raises VerificationFailed.
    """
    report = check(image)
    new = without_runs(Runs(report.leaked.first, report.leaked.count), kept).total
    if not report.sound or new > report.shared_leaks:
        first = next(iter(report.messages), "no details")
        raise VerificationFailed(
            image.name, f"{report.corruptions} corruptions, {new} leaks: {first}"
        )
    if report.shared_leaks:
        return (
            f"refcounts recomputed from the tables: no corruption; {report.shared_leaks} clusters "
            "have too high a refcount, as they are left where QEMU was killed while it wrote to an "
            "image with internal snapshots (`chainmerge repair` lowers it)"
        )
    if report.leaks > new:
        return (
            "refcounts recomputed from the tables: no corruption, no leak but "
            f"{report.leaks - new} clusters that were leaked before"
        )
    return "refcounts recomputed from the tables: no corruption, no leak"


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
