# SPDX-License-Identifier: Apache-2.0
"""Where logical volumes lie on a physical volume, from LVM's own metadata on it.

What is read: the label in one of the first four sectors, the header of the (only) metadata
area, and the text that this leads to, in a ring buffer. See ``lib/format_text/layout.h`` in
the sources of LVM 2.03.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.vm.power.log_writes import Medium

_SECTOR: Final = 512
_LABEL: Final = struct.Struct("<8sQII8s")
_LOCATION: Final = struct.Struct("<QQ")
_AREA_MAGIC: Final = b" LVM2 x[5A%r0N*>"
_AREA_HEAD: Final = struct.Struct("<I16sIQQ")
_TEXT_LOCATION: Final = struct.Struct("<QQII")
# LVM's CRC starts from this instead of all ones.
_CRC_START: Final = 0xF597A6CF


_ALL: Final = re.DOTALL
_SEGMENT: Final = r'start_extent = (\d+)\nextent_count = (\d+).*?stripes = \[\n"pv0", (\d+)'


class NoMetadata(Exception):
    """LVM would not find its volume group here."""


@dataclass(frozen=True)
class Extent:
    """A piece of a logical volume, in bytes."""

    at: int
    offset: int
    length: int


@dataclass(frozen=True)
class Volume:
    """A logical volume's pieces, in order."""

    extents: tuple[Extent, ...]

    @property
    def size(self) -> int:
        return sum(extent.length for extent in self.extents)

    def content(self, medium: Medium) -> bytes:
        return b"".join(medium.read(extent.offset, extent.length) for extent in self.extents)


def volumes_on(medium: Medium) -> Mapping[str, Volume]:
    """The logical volumes by name; they are linear, on this physical volume alone.

    Raises:
        NoMetadata: the text that is current is not there as a whole.
    """
    text = _metadata(medium)
    unit = int(_only(r"extent_size = (\d+)", text)) * _SECTOR
    start = int(_only(r"pe_start = (\d+)", text)) * _SECTOR
    _, _, described = text.partition("logical_volumes {")
    found: dict[str, Volume] = {}
    # On the disk the text has neither indents nor comments. Only volumes begin with an identifier.
    for name, body in re.findall(r"\n(\S+) \{\nid = (.*?)(?=\n\S+ \{\nid = |\Z)", described, _ALL):
        pieces = re.findall(_SEGMENT, body, _ALL)
        found[name] = Volume(
            tuple(
                Extent(int(at) * unit, start + int(first) * unit, int(count) * unit)
                for at, count, first in sorted(pieces, key=lambda piece: int(piece[0]))
            )
        )
    return found


def _metadata(medium: Medium) -> str:
    area = _area_offset(medium)
    head = medium.read(area, _SECTOR)
    checksum, magic, _, _, size = _AREA_HEAD.unpack_from(head)
    if magic != _AREA_MAGIC or checksum != _crc(head[4:]):
        raise NoMetadata("the header of the metadata area is damaged")
    offset, length, text_checksum, _ = _TEXT_LOCATION.unpack_from(head, 40)
    if not length:
        raise NoMetadata("the metadata area is empty")
    # The ring starts behind the header.
    first = min(length, size - offset)
    text = medium.read(area + offset, first) + medium.read(area + _SECTOR, length - first)
    if _crc(text) != text_checksum:
        raise NoMetadata("the text is not there as a whole")
    return text.decode()


def _area_offset(medium: Medium) -> int:
    for sector in range(4):
        label = medium.read(sector * _SECTOR, _SECTOR)
        name, _, _, header, kind = _LABEL.unpack_from(label)
        if name == b"LABELONE" and kind == b"LVM2 001":
            # An identifier and a size, then the data areas and the metadata areas, each list
            # ended by an empty entry.
            position = header + 32 + 8
            while _LOCATION.unpack_from(label, position)[0]:
                position += _LOCATION.size
            return int(_LOCATION.unpack_from(label, position + _LOCATION.size)[0])
    raise NoMetadata("there is no label")


def _only(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise NoMetadata(f"no {pattern!r} in the text")
    return found.group(1)


def _crc(data: bytes) -> int:
    return zlib.crc32(data, _CRC_START ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
