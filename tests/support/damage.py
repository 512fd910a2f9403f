# SPDX-License-Identifier: Apache-2.0
"""Leaves images as a crash or a foreign program would, by changing their bytes."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from chainmerge.qcow2.bitmaps import BitmapFlag, read_directory
from chainmerge.qcow2.features import Autoclear
from chainmerge.qcow2.image import Qcow2Image
from chainmerge.qcow2.readable import BytesReadable

if TYPE_CHECKING:
    from pathlib import Path

_AUTOCLEAR_OFFSET = 88
_FLAGS_IN_ENTRY = 12


def mark_in_use(image: Path, name: str) -> None:
    """Set a bitmap's in-use flag, as a writer that died has left it."""
    content = bytearray(image.read_bytes())
    parsed = Qcow2Image(BytesReadable(str(image), bytes(content)))
    extension = parsed.header.bitmaps
    assert extension is not None
    assert name in {entry.name for entry in read_directory(parsed)}
    position = extension.directory_offset
    while True:
        extra, length = _lengths(content, position)
        stored = content[position + 24 + extra : position + 24 + extra + length]
        if bytes(stored) == name.encode("utf-8", "surrogateescape"):
            break
        position += -(-(24 + extra + length) // 8) * 8
    content[position + _FLAGS_IN_ENTRY + 3] |= BitmapFlag.IN_USE
    image.write_bytes(content)


def _lengths(content: bytearray, position: int) -> tuple[int, int]:
    length, extra = struct.unpack_from(">HI", content, position + 18)
    return extra, length


def forget_autoclear(image: Path) -> None:
    """Clear the autoclear bit of the bitmaps, as a writer that does not know them does."""
    content = bytearray(image.read_bytes())
    content[_AUTOCLEAR_OFFSET + 7] &= ~Autoclear.BITMAPS
    image.write_bytes(content)


def leak_clusters(image: Path, count: int) -> None:
    """Count clusters behind the end as used (16-bit refcounts, 64 KiB clusters)."""
    content = bytearray(image.read_bytes())
    parsed = Qcow2Image(BytesReadable(str(image), bytes(content)))
    header = parsed.header
    assert (header.refcount_bits, header.cluster_size) == (16, 65536)
    (block,) = struct.unpack_from(">Q", content, header.refcount_table_offset)
    first = -(-len(content) // header.cluster_size)
    for cluster in range(first, first + count):
        struct.pack_into(">H", content, block + 2 * cluster, 1)
    content += bytes((first + count) * header.cluster_size - len(content))
    image.write_bytes(content)
