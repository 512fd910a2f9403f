# SPDX-License-Identifier: Apache-2.0
"""Base's checkpoints while guest data is copied into it: ``.BASE.chainmerge-saved``.

QEMU marks every bitmap of an image that it has open for writing as in-use, and a kill leaves
them so; they are therefore taken out of base before the copy (tombstones stand in for them) and
put back, united with top's, after it. A rerun takes them from here.

Saved bitmaps are only good for the chain that they were taken from. Were the overlay
deleted by hand and another one put on base, base may have been written in between with
nothing recording it. So the overlay directly above base is identified
(:mod:`chainmerge.records.identity`), and its bitmaps must still cover what they covered: bits
of a live checkpoint only ever grow.

Layout: the line :data:`MAGIC`; a line of JSON (:class:`_SavedHeader`); the blobs that it
announces, each zlib-compressed chunks of the serialised bitmap; the SHA-256 digest (32 bytes) of
everything before it.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from typing import TYPE_CHECKING, ClassVar, Final

import msgspec
import numpy as np
from msgspec import Struct

from chainmerge.errors import RecordsUnusable, Refused
from chainmerge.qcow2.bits import BitSet
from chainmerge.records.changes import as_called_now
from chainmerge.records.files import (
    StateFile,
    UnusableState,
    decoded,
    encoded,
    is_path,
    make_directory,
)
from chainmerge.records.identity import BlockDevices, ImageIdentity
from chainmerge.records.request import RecordedRequest
from chainmerge.storage.errors import ImageMissing
from chainmerge.storage.files import FileReadable, write_file_durably

if TYPE_CHECKING:
    from pathlib import Path

SAVED_BITMAPS_MAGIC: Final = b"chainmerge saved bitmaps 1\n"
_CHUNK_BYTES: Final = 64 * 1024
_CHUNK_INDEX: Final = struct.Struct("<QI")
_DIGEST_BYTES: Final = 32


class SavedBitmapsDamaged(RecordsUnusable, Refused):
    """The file of saved bitmaps cannot be read."""

    code: ClassVar[str] = "saved-bitmaps-damaged"
    template: ClassVar[str] = "{file}: the bitmaps saved by an interrupted merge are damaged: {why}"
    hint: ClassVar[str] = (
        "remove {file} if you accept that the checkpoints of the interrupted merge are lost: "
        "the next backup that builds on them must be a full one"
    )
    explanation: ClassVar[str] = (
        "While guest data is copied into base, base's checkpoints are kept in a file beside it. "
        "An interrupted merge leaves that file for the rerun. It carries a SHA-256 digest; this "
        "one does not match. Without the saved bitmaps the checkpoints cannot be completed, and a "
        "checkpoint with missing bits would silently corrupt the next incremental backup."
    )
    file: str
    why: str


class _SavedBits(msgspec.Struct, frozen=True):
    granularity: int
    disk_size: int
    length: int


class _SavedName(msgspec.Struct, frozen=True):
    name: list[int]
    base: _SavedBits | None
    overlay: _SavedBits | None


class _SavedHeader(msgspec.Struct, frozen=True):
    base: ImageIdentity
    overlay: ImageIdentity
    bitmaps: list[_SavedName]
    request: RecordedRequest | None = None


class SavedBitmap(Struct, frozen=True):
    """One checkpoint as it was before the merge.

    ``in_base`` are its bits in base, ``in_overlay`` those in the overlay directly above;
    None if the image did not have it.
    """

    name: str
    in_base: BitSet | None
    in_overlay: BitSet | None


class SavedBitmaps(Struct, frozen=True):
    """Base's checkpoints, out of QEMU's reach while it writes into base.

    ``request`` is the merge that was asked for, where that is recorded. If that is a pull in a
    VM, ``base`` is the image that is written, top, and the bits are united with those of the
    images below it already.
    """

    base: ImageIdentity
    overlay: ImageIdentity
    bitmaps: tuple[SavedBitmap, ...]
    request: RecordedRequest | None = None

    @property
    def is_of_pull(self) -> bool:
        """Whether they were saved for a pull in a VM; a cold one saves nothing."""
        return self.request is not None and self.request.options.get("direction") == "pull"


def save_bitmaps(base: Path, saved: SavedBitmaps) -> None:
    """Write the saved bitmaps durably; replaces those of an earlier run.

    Raises chainmerge.errors.Failed where the file system has no room.
    """
    blobs: list[bytes] = []
    names: list[_SavedName] = []
    for bitmap in saved.bitmaps:
        name = list(bitmap.name.encode("utf-8", "surrogateescape"))
        in_base, in_overlay = _announce(bitmap.in_base, blobs), _announce(bitmap.in_overlay, blobs)
        names.append(_SavedName(name, in_base, in_overlay))
    header = encoded(_SavedHeader(saved.base, saved.overlay, names, saved.request))
    document = b"".join([SAVED_BITMAPS_MAGIC, header, *blobs])
    target = SAVED_BITMAPS.place(base)
    make_directory(target.parent)
    write_file_durably(target, document + hashlib.sha256(document).digest(), 0o600)


def read_saved_bitmaps(file: Path, devices: BlockDevices) -> SavedBitmaps | None:
    """The bitmaps saved in *file*; None if there is no such file.

    Raises SavedBitmapsDamaged, and what opening a file raises.
    """
    content = _read_file(file)
    if content is None:
        return None
    document, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.sha256(document).digest() != digest:
        raise SavedBitmapsDamaged(str(file), "its digest does not match")
    if not document.startswith(SAVED_BITMAPS_MAGIC):
        raise SavedBitmapsDamaged(str(file), "its version is not known")
    try:
        return _decode(document, devices)
    except UnusableState as error:
        raise SavedBitmapsDamaged(str(file), str(error)) from error
    except (ValueError, struct.error, zlib.error, MemoryError) as error:
        raise SavedBitmapsDamaged(str(file), f"it cannot be parsed ({error})") from error


def _decode(document: bytes, devices: BlockDevices) -> SavedBitmaps:
    header_end = document.index(b"\n", len(SAVED_BITMAPS_MAGIC)) + 1
    header = decoded(document[len(SAVED_BITMAPS_MAGIC) : header_end], _SavedHeader)
    if not (is_path(header.base.path) and is_path(header.overlay.path)):
        raise UnusableState("a name in it is not a path")
    blobs = memoryview(document)[header_end:]
    bitmaps = []
    for entry in header.bitmaps:
        name = bytes(entry.name).decode("utf-8", "surrogateescape")
        in_base, blobs = _take(entry.base, blobs)
        in_overlay, blobs = _take(entry.overlay, blobs)
        bitmaps.append(SavedBitmap(name, in_base, in_overlay))
    header = as_called_now(header, devices)
    return SavedBitmaps(header.base, header.overlay, tuple(bitmaps), header.request)


def _announce(bits: BitSet | None, blobs: list[bytes]) -> _SavedBits | None:
    """Append the blob of *bits*, and return what the header says of it."""
    if bits is None:
        return None
    blobs.append(_pack(bits))
    return _SavedBits(bits.granularity, bits.disk_size, len(blobs[-1]))


def _take(announced: _SavedBits | None, blobs: memoryview) -> tuple[BitSet | None, memoryview]:
    """The first of *blobs*, unpacked, and the rest."""
    if announced is None:
        return None, blobs
    blob, rest = blobs[: announced.length], blobs[announced.length :]
    return _unpack(blob, announced.disk_size, announced.granularity), rest


SAVED_BITMAPS: Final = StateFile("chainmerge-saved", read_saved_bitmaps, lambda saved: saved.base)
# Each takes the path of base.
saved_bitmaps_file = SAVED_BITMAPS.found
load_saved_bitmaps = SAVED_BITMAPS.load
forget_saved_bitmaps = SAVED_BITMAPS.forget


def _read_file(file: Path) -> bytes | None:
    try:
        with FileReadable(file) as readable:
            return readable.read(0, readable.size)
    except ImageMissing:
        return None


def _pack(bits: BitSet) -> bytes:
    compressor = zlib.compressobj(1)
    parts = []
    for start in range(0, bits.packed_size, _CHUNK_BYTES):
        chunk = bits.packed_range(start, min(_CHUNK_BYTES, bits.packed_size - start))
        if chunk.any():
            parts.append(compressor.compress(_CHUNK_INDEX.pack(start, len(chunk))))
            parts.append(compressor.compress(chunk.tobytes()))
    parts.append(compressor.flush())
    return b"".join(parts)


def _unpack(blob: memoryview, disk_size: int, granularity: int) -> BitSet:
    content = zlib.decompress(blob)
    size = BitSet.empty(disk_size, granularity).packed_size
    packed = np.zeros(size, dtype=np.uint8)
    position = 0
    while position < len(content):
        start, length = _CHUNK_INDEX.unpack_from(content, position)
        position += _CHUNK_INDEX.size
        packed[start : start + length] = np.frombuffer(content, np.uint8, length, position)
        position += length
    return BitSet.from_packed(packed, disk_size, granularity)
