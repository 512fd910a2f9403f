# SPDX-License-Identifier: Apache-2.0
"""How plans and refusals name images, bitmaps and moments."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from chainmerge.chain.model import ImageInfo

NAMED_ONE_BY_ONE: Final = 3


def local_time(nanoseconds: int | None) -> str:
    """A moment in the local time zone."""
    seconds = (nanoseconds or 0) / 10**9
    try:
        return datetime.fromtimestamp(seconds, UTC).astimezone().isoformat(" ", "milliseconds")
    except (ValueError, OverflowError, OSError):
        # Files can have times that no calendar has.
        return f"{seconds:.3f} s after 1970"


def names_of(images: tuple[ImageInfo, ...]) -> str:
    return ", ".join(str(image.path) for image in images)


def run_of_images(images: tuple[ImageInfo, ...]) -> str:
    """Images that follow each other in the chain: by name while a reader can take them in."""
    if len(images) <= NAMED_ONE_BY_ONE:
        return names_of(images)
    return f"{images[0].path} to {images[-1].path} ({len(images)} images)"


def first_few(names: tuple[str, ...]) -> str:
    """Names; if there are many, only the first few."""
    listed = ", ".join(map(repr, names[:NAMED_ONE_BY_ONE]))
    more = len(names) - NAMED_ONE_BY_ONE
    return f"{listed} and {more} more" if more > 0 else listed


def quoted(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)
