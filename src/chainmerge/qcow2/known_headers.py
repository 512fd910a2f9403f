# SPDX-License-Identifier: Apache-2.0
"""Headers that are looked at again: parsed once, for as long as they are what they were."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec import Struct

from chainmerge.arithmetic.rounding import round_up
from chainmerge.qcow2.header import Header, parse_header
from chainmerge.qcow2.readable import Overlaid

if TYPE_CHECKING:
    from collections.abc import Hashable

    from chainmerge.qcow2.readable import Readable

# Longer ones, of which there are few, are parsed whenever they are looked at.
_MOST_BYTES: Final = 4096
_EXTENSION_HEAD: Final = 8


class _Parsed(Struct, frozen=True):
    file_size: int
    beginning: bytes
    """All that the header was parsed from."""
    header: Header


class KnownHeaders:
    """The headers of images, by the bytes that they were parsed from.

    An image is looked at before it is locked and after that. It is read both times: whatever
    has happened in between, a header is used again only if it would be parsed from the same bytes.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._parsed: dict[Hashable, _Parsed] = {}

    def parse(self, identity: Hashable, image: Readable) -> Header:
        """As :func:`chainmerge.qcow2.header.parse_header`, of the image of that identity."""
        beginning = image.read(0, _MOST_BYTES)
        known = self._parsed.get(identity)
        if (
            known is not None
            and known.file_size == image.size
            and beginning.startswith(known.beginning)
        ):
            return known.header
        header = parse_header(Overlaid(image, 0, beginning))
        end = _end_of(header)
        if end <= _MOST_BYTES:
            self._parsed[identity] = _Parsed(image.size, beginning[:end], header)
        return header


def _end_of(header: Header) -> int:
    """Where what a header is parsed from ends, in bytes."""
    last = header.header_length
    if header.extensions:
        extension = header.extensions[-1]
        last = extension.offset + _EXTENSION_HEAD + round_up(len(extension.data), 8)
    # What follows the last extension says that it is the last one.
    return max(last + _EXTENSION_HEAD, header.backing_name_offset + header.backing_name_length)
