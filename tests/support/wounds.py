# SPDX-License-Identifier: Apache-2.0
"""Single wounds in the tables of a qcow2 image, by name."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.support.surgery import (
    BITMAPS_EXTENSION,
    L1_OFFSET,
    REFCOUNT_OFFSET,
    SNAPSHOT_COUNT,
    DirectoryEntry,
    bitmap_directory,
    extension_at,
    get_bytes,
    put_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_OFFSET: Final = 0x00FFFFFFFFFFFE00
_COPIED: Final = 1 << 63
_COMPRESSED: Final = 1 << 62
_BEYOND: Final = 1 << 40
_CLUSTER: Final = 4096


@dataclass(frozen=True)
class Anatomy:
    """Where everything is in an image of 4 KiB clusters with two bitmaps."""

    path: Path

    def number(self, offset: int) -> int:
        return int.from_bytes(get_bytes(self.path, offset, 8))

    @cached_property
    def l1(self) -> int:
        return L1_OFFSET.get(self.path)

    @cached_property
    def l2(self) -> int:
        return self.number(self.l1) & _OFFSET

    @cached_property
    def refcount_table(self) -> int:
        return REFCOUNT_OFFSET.get(self.path)

    @cached_property
    def refcount_block(self) -> int:
        return self.number(self.refcount_table)

    @cached_property
    def extension(self) -> int:
        return extension_at(self.path, BITMAPS_EXTENSION)

    @cached_property
    def directory(self) -> int:
        return self.number(self.extension + 16)

    @cached_property
    def bitmaps(self) -> list[DirectoryEntry]:
        return bitmap_directory(self.path)

    def _entries(self, kind: int) -> list[int]:
        """File offsets of the L2 entries with one of the two topmost flags."""
        places = range(self.l2, self.l2 + _CLUSTER, 8)
        return [place for place in places if self.number(place) >> 62 == kind]

    @cached_property
    def data(self) -> list[int]:
        return self._entries(_COPIED >> 62)

    @cached_property
    def compressed(self) -> list[int]:
        return self._entries(_COMPRESSED >> 62)


Wound = tuple[int, bytes]
"""File offset, and what to write there."""


def long(place: int, value: int) -> Wound:
    return place, struct.pack(">Q", value)


def word(place: int, value: int) -> Wound:
    return place, struct.pack(">I", value)


WOUNDS: Final[dict[str, Callable[[Anatomy], Wound]]] = {
    "L1: table outside the file": lambda a: long(a.l1, _BEYOND | _COPIED),
    "L1: table within a cluster": lambda a: long(a.l1, a.l2 + 512 | _COPIED),
    "L1: reserved bits": lambda a: long(a.l1, a.l2 | 1 << 56),
    "L1: all ones": lambda a: (a.l1, b"\xff" * 8),
    "L2: data outside the file": lambda a: long(a.data[0], _BEYOND | _COPIED),
    "L2: data within a cluster": lambda a: long(a.data[0], a.l2 + 512 | _COPIED),
    "L2: reserved bits": lambda a: long(a.data[0], a.number(a.data[0]) | 1 << 57),
    "L2: compressed data outside the file": lambda a: long(a.compressed[0], _COMPRESSED | 1 << 45),
    "L2: all ones": lambda a: (a.l2, b"\xff" * _CLUSTER),
    "refcount table: block outside the file": lambda a: long(a.refcount_table, _BEYOND),
    "refcount table: block within a cluster": lambda a: long(
        a.refcount_table, a.refcount_block + 512
    ),
    "refcount table: all ones": lambda a: (a.refcount_table, b"\xff" * _CLUSTER),
    "snapshots: outside the file": lambda a: (
        SNAPSHOT_COUNT.offset,
        struct.pack(">IQ", 1, _BEYOND),
    ),
    "snapshots: no table of snapshots": lambda a: (
        SNAPSHOT_COUNT.offset,
        struct.pack(">IQ", 40, a.data[0] // _CLUSTER * _CLUSTER),
    ),
    "bitmaps: directory outside the file": lambda a: long(a.extension + 16, _BEYOND),
    "bitmaps: directory within a cluster": lambda a: long(a.extension + 16, a.directory + 8),
    "bitmaps: directory at 0": lambda a: long(a.extension + 16, 0),
    "bitmaps: directory somewhere else": lambda a: long(a.extension + 16, a.l2),
    "bitmaps: directory too long": lambda a: long(a.extension + 8, 1 << 40),
    "bitmaps: directory too short": lambda a: long(a.extension + 8, 8),
    "bitmaps: more than there are": lambda a: word(a.extension, 3),
    "bitmaps: fewer than there are": lambda a: word(a.extension, 1),
    "bitmaps: 4 billion of them": lambda a: word(a.extension, 2**32 - 1),
    "bitmaps: directory of ones": lambda a: (a.directory, b"\xff" * 48),
    "bitmap: table outside the file": lambda a: long(a.bitmaps[0].offset, _BEYOND),
    "bitmap: table within a cluster": lambda a: long(
        a.bitmaps[0].offset, a.bitmaps[0].table_offset + 8
    ),
    "bitmap: table somewhere else": lambda a: long(a.bitmaps[0].offset, a.l1),
    "bitmap: table too long": lambda a: word(a.bitmaps[0].offset + 8, 2**32 - 1),
    "bitmap: table of no entries": lambda a: word(a.bitmaps[0].offset + 8, 0),
    "bitmap: granularity of 2 ** 64": lambda a: (a.bitmaps[0].offset + 17, b"\x40"),
    "bitmap: name longer than any": lambda a: (a.bitmaps[0].offset + 18, b"\xff\xff"),
    "bitmap: extra data without end": lambda a: word(a.bitmaps[0].offset + 20, 2**32 - 1),
    "bitmap: two of one name": lambda a: (a.bitmaps[1].offset + 24, b"both"),
    "bitmap: bits outside the file": lambda a: long(a.bitmaps[0].table_offset, _BEYOND),
    "bitmap: bits within a cluster": lambda a: long(a.bitmaps[0].table_offset, a.l2 + 8),
    "bitmap: all bits set, and somewhere": lambda a: long(a.bitmaps[0].table_offset, a.l2 + 1),
}
"""What keeps an image from being read, whoever reads it."""

OVERLAPS: Final[dict[str, Callable[[Anatomy], Wound]]] = {
    "L1: the L1 table is an L2 table": lambda a: long(a.l1, a.l1 | _COPIED),
    "L1: the refcount table is an L2 table": lambda a: long(a.l1, a.refcount_table | _COPIED),
    "L2: the L1 table is data": lambda a: long(a.data[0], a.l1 | _COPIED),
    "L2: the L2 table is data": lambda a: long(a.data[0], a.l2 | _COPIED),
    "L2: the refcount block is data": lambda a: long(a.data[0], a.refcount_block | _COPIED),
    "L2: the bitmap directory is data": lambda a: long(a.data[0], a.directory | _COPIED),
    "L2: the same data twice": lambda a: long(a.data[0], a.number(a.data[1])),
    "refcount table: the L2 table is a block": lambda a: long(a.refcount_table, a.l2),
    "refcount table: it is its own block": lambda a: long(a.refcount_table, a.refcount_table),
    "refcount table: the same block twice": lambda a: long(a.refcount_table + 8, a.refcount_block),
    "refcounts: all 0": lambda a: (a.refcount_block, bytes(_CLUSTER)),
    "refcounts: all 65535": lambda a: (a.refcount_block, b"\xff" * _CLUSTER),
    "bitmap: the directory is a table": lambda a: long(a.bitmaps[1].offset, a.directory),
    "bitmap: two with the same table": lambda a: long(
        a.bitmaps[1].offset, a.bitmaps[0].table_offset
    ),
    "bitmap: two with the same bits": lambda a: long(
        a.bitmaps[1].table_offset, a.number(a.bitmaps[0].table_offset)
    ),
    "bitmap: the L2 table is its bits": lambda a: long(a.bitmaps[0].table_offset, a.l2),
}
"""What can be read, if not to any good use: one of two things was written over the other."""


def inflict(path: Path, wound: Callable[[Anatomy], Wound]) -> None:
    put_bytes(path, *wound(Anatomy(path)))
