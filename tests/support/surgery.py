# SPDX-License-Identifier: Apache-2.0
"""Changes single fields of closed qcow2 images, in place.

Finds its way by the qcow2 specification alone, so that it can also be pointed at what our own
parser refuses.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

BITMAPS_EXTENSION: Final = 0x23852875
_DIRECTORY_ENTRY: Final = struct.Struct(">QIIBBHI")
_BITMAP_IN_USE: Final = 1


@dataclass(frozen=True)
class Field:
    """A number in the header: its name in the specification, its place, its width."""

    name: str
    offset: int
    width: int

    def get(self, path: Path) -> int:
        return int.from_bytes(get_bytes(path, self.offset, self.width))

    def put(self, path: Path, value: int) -> None:
        put_bytes(path, self.offset, value.to_bytes(self.width))


VERSION: Final = Field("version", 4, 4)
BACKING_OFFSET: Final = Field("backing_file_offset", 8, 8)
BACKING_LENGTH: Final = Field("backing_file_size", 16, 4)
CLUSTER_BITS: Final = Field("cluster_bits", 20, 4)
VIRTUAL_SIZE: Final = Field("size", 24, 8)
CRYPT_METHOD: Final = Field("crypt_method", 32, 4)
L1_SIZE: Final = Field("l1_size", 36, 4)
L1_OFFSET: Final = Field("l1_table_offset", 40, 8)
REFCOUNT_OFFSET: Final = Field("refcount_table_offset", 48, 8)
REFCOUNT_CLUSTERS: Final = Field("refcount_table_clusters", 56, 4)
SNAPSHOT_COUNT: Final = Field("nb_snapshots", 60, 4)
SNAPSHOTS_OFFSET: Final = Field("snapshots_offset", 64, 8)
INCOMPATIBLE: Final = Field("incompatible_features", 72, 8)
AUTOCLEAR: Final = Field("autoclear_features", 88, 8)
REFCOUNT_ORDER: Final = Field("refcount_order", 96, 4)
HEADER_LENGTH: Final = Field("header_length", 100, 4)
COMPRESSION_TYPE: Final = Field("compression_type", 104, 1)


def get_bytes(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def put_bytes(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def extension_at(path: Path, kind: int) -> int:
    """File offset of the data of a header extension that is there."""
    offset = HEADER_LENGTH.get(path)
    while True:
        found, length = struct.unpack(">II", get_bytes(path, offset, 8))
        if found == kind:
            return offset + 8
        if found == 0:
            msg = f"{path} has no header extension {kind:#x}"
            raise LookupError(msg)
        offset += 8 + -(-length // 8) * 8


@dataclass(frozen=True)
class DirectoryEntry:
    """A bitmap in the bitmap directory, and where the entry is."""

    offset: int
    name: str
    table_offset: int
    table_size: int
    flags: int


def bitmap_directory(path: Path) -> list[DirectoryEntry]:
    extension = extension_at(path, BITMAPS_EXTENSION)
    count, _, _, offset = struct.unpack(">IIQQ", get_bytes(path, extension, 24))
    entries = []
    for _ in range(count):
        data = get_bytes(path, offset, _DIRECTORY_ENTRY.size)
        table_offset, table_size, flags, _, _, name_size, extra = _DIRECTORY_ENTRY.unpack(data)
        start = offset + _DIRECTORY_ENTRY.size + extra
        name = get_bytes(path, start, name_size).decode()
        entries.append(DirectoryEntry(offset, name, table_offset, table_size, flags))
        offset += -(-(_DIRECTORY_ENTRY.size + extra + name_size) // 8) * 8
    return entries


def mark_bitmap_in_use(path: Path, name: str) -> None:
    """As if the last writer had died with the image open."""
    (entry,) = (each for each in bitmap_directory(path) if each.name == name)
    put_bytes(path, entry.offset + 12, struct.pack(">I", entry.flags | _BITMAP_IN_USE))


def clear_autoclear_features(path: Path) -> None:
    """As a writer does that knows none of these features."""
    AUTOCLEAR.put(path, 0)
