# SPDX-License-Identifier: Apache-2.0
"""The header cluster, recomposed so that one sector switches from old to new.

The first 512 bytes of an image are the root of everything in it. Whatever must change
at the same instant has to be in them, and QEMU's own order of header extensions puts
the bitmaps extension at byte 504 or 520, over their edge. The order written here is

    header | bitmaps | backing format | the others as they were | end marker

without the feature name table where it would not fit (it only serves error messages
about features that a program does not know). The specification leaves the order open;
QEMU 7.2 and 10.0 read this one, and write their own again when they change the header.

Bytes behind the first sector are only ever written where the old header does not look.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from msgspec import Struct

from chainmerge.arithmetic.rounding import round_up
from chainmerge.engines.metadata.errors import BackingNameUnfit, HeaderFull
from chainmerge.qcow2.features import Autoclear, BitmapsExtension, ExtensionType, Incompatible
from chainmerge.qcow2.header import MAX_BACKING_FORMAT_BYTES, MAX_BACKING_NAME_BYTES, SECTOR, Header

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_BACKING_NAME_FIELD = struct.Struct(">QI")
_BACKING_NAME_AT = 8
_VIRTUAL_SIZE_FIELD = struct.Struct(">Q")
_VIRTUAL_SIZE_AT = 24
_L1_TABLE_FIELD = struct.Struct(">IQ")
_L1_TABLE_AT = 36
_REFCOUNT_TABLE_FIELD = struct.Struct(">QI")
_REFCOUNT_TABLE_AT = 48
_SNAPSHOTS_FIELD = struct.Struct(">IQ")
_SNAPSHOTS_AT = 60
_INCOMPATIBLE_FIELD = struct.Struct(">Q")
_INCOMPATIBLE_AT = 72
_AUTOCLEAR_FIELD = struct.Struct(">Q")
_AUTOCLEAR_AT = 88
_EXTENSION = struct.Struct(">II")
_BITMAPS = struct.Struct(">IIQQ")
_END_MARKER = bytes(_EXTENSION.size)
_KNOWN_AUTOCLEAR = Autoclear.BITMAPS | Autoclear.RAW_DATA_FILE


class HeaderContent(Struct, frozen=True):
    """The parts of a header that this package changes, as they shall be.

    Attributes:
        virtual_size: Size of the guest's disk in bytes.
        l1_size: Length of the active L1 table in entries.
        l1_table_offset: Its file offset in bytes.
        bitmaps: The bitmaps extension, None for an image without one.
        bitmaps_trusted: Whether the autoclear bit vouches for the bitmaps.
        refcount_table_offset: File offset in bytes.
        refcount_table_clusters: Its size in clusters.
        snapshot_count: Number of internal snapshots.
        snapshots_offset: File offset of the table that lists them, in bytes; 0 without any.
        backing_name: As in :class:`chainmerge.qcow2.header.Header`.
        backing_format: The format's name, None for an image that does not say.
        incompatible: The feature bits of that kind; version 2 has none.
    """

    virtual_size: int
    l1_size: int
    l1_table_offset: int
    bitmaps: BitmapsExtension | None
    bitmaps_trusted: bool
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshot_count: int
    snapshots_offset: int
    backing_name: str | None
    backing_format: str | None
    incompatible: Incompatible


class HeaderWrite(Struct, frozen=True):
    """The bytes that turn the old header into the new one.

    Attributes:
        beyond: Writes (file offset, bytes) behind the first sector. They mean nothing to
            the old header, and must be durable before the switch.
        sector: The new first 512 bytes: the switch.
    """

    beyond: tuple[tuple[int, bytes], ...]
    sector: bytes


def content_of(header: Header) -> HeaderContent:
    """What the header says today."""
    return HeaderContent(
        virtual_size=header.virtual_size,
        l1_size=header.l1_size,
        l1_table_offset=header.l1_table_offset,
        bitmaps=header.bitmaps,
        bitmaps_trusted=header.bitmaps_trusted,
        refcount_table_offset=header.refcount_table_offset,
        refcount_table_clusters=header.refcount_table_clusters,
        snapshot_count=header.snapshot_count,
        snapshots_offset=header.snapshots_offset,
        backing_name=header.backing_name,
        backing_format=header.backing_format,
        incompatible=header.incompatible,
    )


def compose_header(
    image: str, cluster: bytes, header: Header, content: HeaderContent
) -> HeaderWrite:
    """Lay out the header cluster anew.

    Args:
        image: What messages call the image.
        cluster: The image's first cluster as it is.
        header: The same, parsed.
        content: What it shall say.

    Raises:
        BackingNameUnfit: the backing name or format is one that QEMU would not read.
        HeaderFull: there is no layout that one sector write can switch to.
    """
    name = b""
    if content.backing_name is not None:
        name = _backing_text(image, "file name", content.backing_name, MAX_BACKING_NAME_BYTES)
    fields = _fields(cluster, header, content, name)
    live = _live_bytes(header)
    needed = 0
    for extensions in _extension_choices(image, header, content):
        area = fields + b"".join(map(_packed, extensions)) + _END_MARKER
        needed = len(area) + len(name)
        optional = any(kind == ExtensionType.FEATURE_NAMES for kind, _ in extensions)
        if optional and len(area) > SECTOR:
            continue
        for name_offset in _name_places(header, content, len(area), len(name)):
            composed = _composed(cluster, area, name, name_offset)
            if composed is not None and _harmless(cluster, composed, live):
                return HeaderWrite(_beyond(cluster, composed), composed[:SECTOR])
    raise HeaderFull(image, needed, header.cluster_size)


def stored_name(name: str, longest: int) -> bytes | None:
    """The bytes under which an image stores a name; None for one that it cannot store."""
    try:
        stored = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return None
    return stored if 0 < len(stored) <= longest and b"\0" not in stored else None


def _backing_text(image: str, what: str, value: str, longest: int) -> bytes:
    stored = stored_name(value, longest)
    if stored is None:
        raise BackingNameUnfit(image, what, value, f"it must be 1 to {longest} bytes without NUL")
    return stored


def _fields(cluster: bytes, header: Header, content: HeaderContent, name: bytes) -> bytes:
    """The header proper, except for the offset of the backing name."""
    fields = bytearray(cluster[: header.header_length])
    _BACKING_NAME_FIELD.pack_into(fields, _BACKING_NAME_AT, 0, len(name))
    _VIRTUAL_SIZE_FIELD.pack_into(fields, _VIRTUAL_SIZE_AT, content.virtual_size)
    _L1_TABLE_FIELD.pack_into(fields, _L1_TABLE_AT, content.l1_size, content.l1_table_offset)
    _REFCOUNT_TABLE_FIELD.pack_into(
        fields,
        _REFCOUNT_TABLE_AT,
        content.refcount_table_offset,
        content.refcount_table_clusters,
    )
    _SNAPSHOTS_FIELD.pack_into(
        fields, _SNAPSHOTS_AT, content.snapshot_count, content.snapshots_offset
    )
    if header.version >= 3:
        autoclear = header.autoclear & _KNOWN_AUTOCLEAR & ~Autoclear.BITMAPS
        if content.bitmaps_trusted:
            autoclear |= Autoclear.BITMAPS
        _AUTOCLEAR_FIELD.pack_into(fields, _AUTOCLEAR_AT, autoclear)
        _INCOMPATIBLE_FIELD.pack_into(fields, _INCOMPATIBLE_AT, content.incompatible)
    return bytes(fields)


def _extension_choices(
    image: str, header: Header, content: HeaderContent
) -> Iterator[list[tuple[int, bytes]]]:
    """Extensions (type, data) in their new order: with the feature names, then without."""
    first: list[tuple[int, bytes]] = []
    if content.bitmaps is not None:
        bitmaps = content.bitmaps
        data = _BITMAPS.pack(bitmaps.count, 0, bitmaps.directory_size, bitmaps.directory_offset)
        first.append((ExtensionType.BITMAPS, data))
    if content.backing_format is not None:
        data = _backing_text(image, "format", content.backing_format, MAX_BACKING_FORMAT_BYTES)
        first.append((ExtensionType.BACKING_FORMAT, data))
    ours = {ExtensionType.BITMAPS, ExtensionType.BACKING_FORMAT}
    others = [(item.type, item.data) for item in header.extensions if item.type not in ours]
    yield first + others
    without_names = [item for item in others if item[0] != ExtensionType.FEATURE_NAMES]
    if len(without_names) < len(others):
        yield first + without_names


def _packed(extension: tuple[int, bytes]) -> bytes:
    kind, data = extension
    return _EXTENSION.pack(kind, len(data)) + data.ljust(_padded(len(data)), b"\0")


def _padded(length: int) -> int:
    return round_up(length, 8)


def _live_bytes(header: Header) -> list[tuple[int, int]]:
    """Ranges (start, end) of the header cluster that mean something to the old header."""
    return [(0, _old_area_end(header)), _old_name(header)]


def _old_area_end(header: Header) -> int:
    end = header.header_length
    if header.extensions:
        last = header.extensions[-1]
        end = last.offset + _EXTENSION.size + _padded(len(last.data))
    return end + len(_END_MARKER)


def _old_name(header: Header) -> tuple[int, int]:
    start = header.backing_name_offset
    return start, start + header.backing_name_length


def _name_places(
    header: Header, content: HeaderContent, area_end: int, length: int
) -> Iterator[int]:
    """Offsets where the backing name could go, the best first; 0 is for no name."""
    if not length:
        yield 0
        return
    old_start, old_end = _old_name(header)
    if content.backing_name == header.backing_name and old_start >= area_end:
        yield old_start
    # In the first sector it is switched with the rest; else it needs a place of its own.
    yield area_end
    for start in sorted({SECTOR, _padded(_old_area_end(header)), _padded(old_end)}):
        yield max(start, area_end)


def _composed(cluster: bytes, area: bytes, name: bytes, name_offset: int) -> bytes | None:
    """The whole new header cluster, or None if the parts do not fit into it."""
    if max(len(area), name_offset + len(name)) > len(cluster):
        return None
    composed = bytearray(cluster)
    composed[:SECTOR] = bytes(SECTOR)
    composed[: len(area)] = area
    if name:
        composed[name_offset : name_offset + len(name)] = name
        _BACKING_NAME_FIELD.pack_into(composed, _BACKING_NAME_AT, name_offset, len(name))
    return bytes(composed)


def _harmless(cluster: bytes, composed: bytes, live: Sequence[tuple[int, int]]) -> bool:
    """Whether what differs behind the first sector is nothing that the old header uses."""
    return all(
        cluster[max(start, SECTOR) : end] == composed[max(start, SECTOR) : end]
        for start, end in live
    )


def _beyond(cluster: bytes, composed: bytes) -> tuple[tuple[int, bytes], ...]:
    """What differs behind the first sector, in whole sectors and one piece."""
    differing = [
        start
        for start in range(SECTOR, len(composed), SECTOR)
        if cluster[start : start + SECTOR] != composed[start : start + SECTOR]
    ]
    if not differing:
        return ()
    start, end = differing[0], differing[-1] + SECTOR
    return ((start, composed[start:end]),)
