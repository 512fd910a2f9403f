# SPDX-License-Identifier: Apache-2.0
"""Where everything is in a sound image: what a mutation can aim at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from chainmerge.qcow2.bitmaps import read_directory
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import BytesReadable
from chainmerge.qcow2.snapshots import read_snapshots
from tests.support import surgery

if TYPE_CHECKING:
    from collections.abc import Iterator

_OFFSET: Final = 0x00FFFFFFFFFFFE00
_BITMAP_OFFSET: Final = 0x00FFFFFFFFFFFE00
_HEADER_FIELDS: Final = (
    surgery.VERSION,
    surgery.BACKING_OFFSET,
    surgery.BACKING_LENGTH,
    surgery.CLUSTER_BITS,
    surgery.VIRTUAL_SIZE,
    surgery.CRYPT_METHOD,
    surgery.L1_SIZE,
    surgery.L1_OFFSET,
    surgery.REFCOUNT_OFFSET,
    surgery.REFCOUNT_CLUSTERS,
    surgery.SNAPSHOT_COUNT,
    surgery.SNAPSHOTS_OFFSET,
    surgery.INCOMPATIBLE,
    surgery.AUTOCLEAR,
    surgery.REFCOUNT_ORDER,
    surgery.HEADER_LENGTH,
    surgery.COMPRESSION_TYPE,
)
_SHOWN: Final = 64
"""Entries at the beginning of a table that are aimed at, besides those that are not 0."""


@dataclass(frozen=True)
class Target:
    """Some bytes of an image with a meaning of their own; numbers are big-endian."""

    kind: str
    offset: int
    width: int


@dataclass(frozen=True)
class Anatomy:
    """The targets of an image by their kind, and the offsets that mean something in it."""

    size: int
    cluster_size: int
    targets: dict[str, tuple[Target, ...]]
    landmarks: tuple[int, ...]


def anatomy_of(content: bytes) -> Anatomy:
    """Look at a sound image."""
    found: dict[str, list[Target]] = {}
    landmarks: list[int] = []
    for target in _targets(content, landmarks):
        found.setdefault(target.kind, []).append(target)
    cluster_size = 1 << int.from_bytes(content[20:24])
    return Anatomy(
        len(content),
        cluster_size,
        {kind: tuple(each) for kind, each in found.items()},
        tuple(sorted(set(landmarks))),
    )


def _targets(content: bytes, landmarks: list[int]) -> Iterator[Target]:
    image = Qcow2Image(BytesReadable("sound", content))
    header = image.header
    for field in _HEADER_FIELDS[: len(_HEADER_FIELDS) if header.version > 2 else 12]:
        yield Target("header", field.offset, field.width)
    for extension in header.extensions:
        yield Target("extension", extension.offset, 4)
        yield Target("extension", extension.offset + 4, 4)
        for place in range(0, min(len(extension.data), 64) // 4 * 4, 4):
            yield Target("extension", extension.offset + 8 + place, 4)
    for place in range(header.backing_name_length):
        yield Target("backing name", header.backing_name_offset + place, 1)
    landmarks += [header.l1_table_offset, header.refcount_table_offset, header.snapshots_offset]
    yield from _mapping(content, header.l1_table_offset, header.l1_size, header, landmarks)
    for snapshot in read_snapshots(image):
        yield from _mapping(content, snapshot.l1_offset, snapshot.l1_size, header, landmarks)
        landmarks.append(snapshot.l1_offset)
    if header.snapshot_count:
        for place in range(0, 80, 4):
            yield Target("snapshot", header.snapshots_offset + place, 4)
    yield from _refcounts(content, header.refcount_table_offset, header, landmarks)
    yield from _bitmaps(content, image, landmarks)


def _number(content: bytes, offset: int) -> int:
    return int.from_bytes(content[offset : offset + 8])


def _entries(content: bytes, offset: int, count: int) -> Iterator[int]:
    """Where entries of a table stand that are worth a change."""
    for index in range(count):
        place = offset + 8 * index
        if index < _SHOWN or _number(content, place):
            yield place


def _mapping(
    content: bytes, l1: int, entries: int, header: object, landmarks: list[int]
) -> Iterator[Target]:
    cluster_size = 1 << int.from_bytes(content[20:24])
    for place in _entries(content, l1, entries):
        yield Target("L1", place, 8)
        table = _number(content, place) & _OFFSET
        if not table:
            continue
        landmarks.append(table)
        for entry in _entries(content, table, cluster_size // 8):
            yield Target("L2", entry, 8)
            word = _number(content, entry)
            if word >> 62 == 1:
                host = word & ((1 << 50) - 1)
                yield from (Target("compressed data", host + at, 1) for at in range(32))
            elif word & _OFFSET and word >> 62 == 2:
                landmarks.append(word & _OFFSET)


def _refcounts(
    content: bytes, table: int, header: object, landmarks: list[int]
) -> Iterator[Target]:
    cluster_size = 1 << int.from_bytes(content[20:24])
    clusters = int.from_bytes(content[56:60])
    for place in _entries(content, table, clusters * cluster_size // 8):
        yield Target("refcount table", place, 8)
        block = _number(content, place) & _OFFSET
        if block:
            landmarks.append(block)
            for at in range(block, block + cluster_size, 2):
                if at < block + 2 * _SHOWN or content[at : at + 2] != b"\0\0":
                    yield Target("refcount block", at, 2)


def _bitmaps(content: bytes, image: Qcow2Image, landmarks: list[int]) -> Iterator[Target]:
    extension = image.header.bitmaps
    if extension is None:
        return
    landmarks.append(extension.directory_offset)
    for at in range(0, extension.directory_size, 4):
        yield Target("bitmap directory", extension.directory_offset + at, 4)
    for entry in read_directory(image):
        landmarks.append(entry.table_offset)
        for place in _entries(content, entry.table_offset, entry.table_size):
            yield Target("bitmap table", place, 8)
            data = _number(content, place) & _BITMAP_OFFSET
            if data:
                landmarks.append(data)
                yield from (Target("bitmap data", data + at, 8) for at in range(0, 64, 8))
