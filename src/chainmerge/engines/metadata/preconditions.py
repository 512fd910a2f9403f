# SPDX-License-Identifier: Apache-2.0
"""What must hold of an image before any of its clusters is taken for free."""

from __future__ import annotations

from msgspec import Struct

from chainmerge.chain.errors import ImageCorrupt, ImageDamaged, ImageDirty
from chainmerge.qcow2.check import CheckReport, check
from chainmerge.qcow2.features import Autoclear
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import Readable

# The autoclear bits are header bytes 88 to 95, the most significant first.
_LOWEST_AUTOCLEAR_BYTE = 95
_VERSION_AT = 4


def require_sound(image: Qcow2Image) -> bool:
    """Check that the image's free clusters are free; whether its bitmaps are sound too.

    Broken bitmaps alone do not make an image unsound: replacing them is how it is repaired.

    Raises:
        ImageDirty, ImageCorrupt: as :func:`require_clean_bits`.
        ImageDamaged: its refcounts are too low, or its tables otherwise wrong.
    """
    require_clean_bits(image)
    if check(image).sound:
        return True
    require_sound_report(check(without_bitmaps(image)))
    return False


def require_clean_bits(image: Qcow2Image) -> None:
    """Refuse an image that says of itself that its metadata cannot be relied on.

    Raises:
        ImageDirty: its refcounts may be stale.
        ImageCorrupt: QEMU found it damaged.
    """
    require_not_corrupt(image)
    if image.header.dirty:
        raise ImageDirty(image.name)


def require_not_corrupt(image: Qcow2Image) -> None:
    """Refuse an image that QEMU found damaged."""
    if image.header.corrupt:
        raise ImageCorrupt(image.name)


def require_sound_report(report: CheckReport) -> None:
    """Refuse an image in which a check found more than leaks."""
    if not report.sound:
        first = report.messages[0] if report.messages else "no details"
        raise ImageDamaged(report.image, report.corruptions + report.overlaps, first)


def without_bitmaps(image: Qcow2Image) -> Qcow2Image:
    """The same image as a program sees it that does not trust its bitmaps."""
    return Qcow2Image(readable_without_bitmaps(image.readable))


def readable_without_bitmaps(image: Readable) -> Readable:
    """The same file, its header saying that its bitmaps cannot be trusted."""
    # Version 2 has something else in that byte, and no bitmaps.
    has_bitmaps = int.from_bytes(image.read(_VERSION_AT, 4)) >= 3
    return _UntrustedBitmaps(image) if has_bitmaps else image


class _UntrustedBitmaps(Struct, frozen=True):
    """An image with the autoclear bit of its bitmaps read as 0."""

    image: Readable

    @property
    def name(self) -> str:
        return self.image.name

    @property
    def size(self) -> int:
        return self.image.size

    def read(self, offset: int, length: int) -> bytes:
        data = self.image.read(offset, length)
        at = _LOWEST_AUTOCLEAR_BYTE - offset
        if not 0 <= at < length:
            return data
        return data[:at] + bytes([data[at] & ~Autoclear.BITMAPS]) + data[at + 1 :]
