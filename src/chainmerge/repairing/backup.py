# SPDX-License-Identifier: Apache-2.0
"""What a repair overwrites, saved in a file, so that it can be put back.

Before each write to the image, the old bytes are written to the backup and made durable. So nothing
is ever overwritten that the backup does not have. A backup is read
from its end: undoing the last write first makes every state on the way back one that the
repair went through, and that an interruption could have left.

Layout: the line :data:`MAGIC`; a line of JSON (:class:`_Head`); records. A record is
:data:`_RECORD`, for a write followed by the old bytes, zlib-compressed. A backup whose
repair came to its end has a seal for its last record, or says how much of an undoing is left.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

import msgspec
import numpy as np
from msgspec import Struct

from chainmerge.errors import RecordsUnusable, Refused
from chainmerge.records import files as state_files
from chainmerge.records.files import UnusableState, decoded, encoded, make_directory, remove_durably
from chainmerge.records.identity import ImageIdentity, identify, may_be_same
from chainmerge.storage.errors import CannotOpen
from chainmerge.storage.files import AppendedFile, FileReadable, WritablePort, fsync_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainmerge.qcow2.readable import Readable

BACKUP_MAGIC: Final = b"chainmerge repair backup 1\n"
BACKUP_SUFFIX: Final = "chainmerge-repair"
_RECORD: Final = struct.Struct(">4sQQQQ32s32s")
_CHECKSUM: Final = struct.Struct(">I")
_LONGEST_HEAD: Final = 64 << 10
# The largest write that a repair makes: 8 MiB.
_LARGEST_WRITE: Final = 64 << 20
_BLANKED_AT_ONCE: Final = 8 << 20
_MOST_BACKUPS: Final = 1000


class _Kind(StrEnum):
    WRITE = "WRIT"
    FLUSH = "FLSH"
    SEAL = "SEAL"
    UNDO = "UNDO"


class BackupUnusable(RecordsUnusable, Refused):
    """A file is not a backup of a repair, or is a damaged one."""

    code: ClassVar[str] = "repair-backup-unusable"
    template: ClassVar[str] = "{backup} cannot be used as the backup of a repair: {why}"
    hint: ClassVar[str] = (
        "give the file that `chainmerge repair --yes` named in its report; it is beside the image, "
        "or where --backup said"
    )
    explanation: ClassVar[str] = (
        "Before `chainmerge repair` changes an image, it saves what it is going to overwrite in a "
        "file, with a checksum of each piece. This file is not such a backup, or it was damaged. "
        "The image was not changed."
    )
    backup: str
    why: str


class ChangedSinceRepair(Refused):
    """The image is no longer what the repair made of it."""

    code: ClassVar[str] = "changed-since-repair"
    template: ClassVar[str] = "{image} has been changed since it was repaired: {what}"
    hint: ClassVar[str] = (
        "leave it as it is: what was there before was damaged, and would not fit what was written "
        "since"
    )
    explanation: ClassVar[str] = (
        "`chainmerge repair --undo` puts back the bytes that a repair has overwritten. That is "
        "right only as long as nobody has written to the image since: otherwise the old tables "
        "would not contain what was written, and a guest's data would be lost. So the image must "
        "be the same file, with the size and the modification time that the repair left, and with "
        "the same bytes in every place that the repair wrote to. Nothing was changed."
    )
    image: str
    what: str


class _Head(msgspec.Struct, frozen=True):
    image: ImageIdentity
    size: int
    is_block_device: bool


class _Record(Struct, frozen=True):
    """One thing that was done to the image.

    ``offset``, ``length`` and ``old_length`` are of a write, ``size`` and ``changed`` of a seal,
    all but ``changed`` (nanoseconds) in bytes; ``left`` is of an undoing, a number of records.
    """

    kind: str
    offset: int
    length: int
    old_length: int
    packed_length: int
    new_digest: bytes
    old_digest: bytes
    packed_at: int

    @property
    def end(self) -> int:
        """Where the next record begins."""
        return self.packed_at + self.packed_length

    @property
    def size(self) -> int:
        return self.offset

    @property
    def left(self) -> int:
        return self.offset

    @property
    def changed(self) -> int:
        return self.length


# Making one


class RecordedPort:
    """An image that is repaired, each write of which is preceded by one to the backup."""

    def __init__(self, port: WritablePort, backup: Path) -> None:
        """Begin a backup.

        Raises:
            CannotOpen, AccessDenied, NoSpaceLeft, ...: there is no place for it.
        """
        self._port = port
        self._backup = AppendedFile.created(backup)
        identity = identify(Path(port.name))
        head = _Head(identity, port.size, port.is_block_device)
        self._backup.append(BACKUP_MAGIC + encoded(head))
        self._backup.flush()
        fsync_directory(backup.parent)
        self._wrote = False

    @property
    def name(self) -> str:
        """The image's path."""
        return self._port.name

    @property
    def size(self) -> int:
        """Bytes."""
        return self._port.size

    @property
    def is_block_device(self) -> bool:
        """Whether the size is what it is."""
        return self._port.is_block_device

    @property
    def wrote(self) -> bool:
        """Whether anything was written."""
        return self._wrote

    def read(self, offset: int, length: int) -> bytes:
        """As :meth:`chainmerge.storage.files.WritablePort.read`."""
        return self._port.read(offset, length)

    def reserve(self, offset: int, length: int) -> None:
        """As :meth:`chainmerge.storage.files.WritablePort.reserve`."""
        self._port.reserve(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        """Save the old bytes, durably, and then write."""
        old = self._port.read(offset, max(0, min(len(data), self._port.size - offset)))
        packed = zlib.compress(old, 1)
        record = _packed_record(_Kind.WRITE, offset, len(data), len(old), len(packed), data, old)
        self._backup.append(record + packed)
        self._backup.flush()
        self._wrote = True
        self._port.write(offset, data)

    def truncate_to(self, size: int) -> None:
        """As :meth:`chainmerge.storage.files.WritablePort.truncate_to`; what goes is kept."""
        if size < self.size:
            self._blank(size, self.size - size)
        self._port.truncate_to(size)

    def punch(self, offset: int, length: int) -> None:
        """As :meth:`chainmerge.storage.files.WritablePort.punch`; what goes is kept."""
        self._blank(offset, max(0, min(length, self.size - offset)))
        self._port.punch(offset, length)

    def _blank(self, offset: int, length: int) -> None:
        for done in range(0, length, _BLANKED_AT_ONCE):
            self.write(offset + done, bytes(min(_BLANKED_AT_ONCE, length - done)))

    def flush(self) -> None:
        """As :meth:`chainmerge.storage.files.WritablePort.flush`."""
        self._port.flush()
        self._backup.append(_packed_record(_Kind.FLUSH, 0, 0, 0, 0, b"", b""))

    def forget_cached(self) -> None:
        """As :meth:`chainmerge.storage.files.WritablePort.forget_cached`."""
        self._port.forget_cached()

    def seal(self) -> None:
        """Note, durably, that the repair is complete, and what the image is by now."""
        changed = _time_of_change(self._port)
        self._backup.append(_packed_record(_Kind.SEAL, self._port.size, changed, 0, 0, b"", b""))
        self._backup.flush()

    def close(self) -> None:
        """Close the backup; one in which nothing is is removed."""
        self._backup.close()
        if not self._wrote:
            remove_durably(Path(self._backup.name))


def new_backup(image: Path, directory: Path | None) -> Path:
    """Where the backup of a repair of *image* is to stand: a name that is free.

    Args:
        image: the image that is repaired.
        directory: where to put it; None for beside the image, or for a block device in
            :data:`chainmerge.records.files.STATE_DIRECTORY`.

    Raises:
        CannotOpen: all names are taken.
        StateDirectoryUnusable: there is no place for it.
    """
    real = Path(os.path.realpath(image))
    name = real.name
    if directory is None:
        directory = real.parent
        if real.is_block_device():
            directory = state_files.STATE_DIRECTORY
            name = str(real).strip("/").replace("/", "-")
            make_directory(directory)
    # File names have at most 255 bytes.
    name = os.fsdecode(os.fsencode(name)[:200])
    for number in range(1, _MOST_BACKUPS):
        path = directory / f"{name}.{BACKUP_SUFFIX}-{number}"
        if not os.path.lexists(path):
            return path
    raise CannotOpen(str(directory / name), "writing", f"there are already {_MOST_BACKUPS} backups")


def _packed_record(
    kind: _Kind, first: int, second: int, third: int, fourth: int, new: bytes, old: bytes
) -> bytes:
    digests = hashlib.sha256(new).digest(), hashlib.sha256(old).digest()
    record = _RECORD.pack(kind.encode("ascii"), first, second, third, fourth, *digests)
    return record + _CHECKSUM.pack(zlib.crc32(record))


def _time_of_change(file: FileReadable) -> int:
    """When a regular file was last written to, in nanoseconds; 0 for a block device."""
    return 0 if file.is_block_device else os.fstat(file.fd).st_mtime_ns


# Using one


class Backup:
    """A backup that can be read."""

    def __init__(self, path: Path) -> None:
        """Read where everything is in it; the bytes themselves are read when they are needed.

        Raises:
            BackupUnusable: it is none, or damaged.
            ImageMissing, AccessDenied, ...: it cannot be opened.
        """
        self.path = path
        with FileReadable(path) as file:
            self._head, start = _read_head(file)
            records = tuple(_read_records(file, start))
        self._end = max((one.end for one in records), default=start)
        self._done = tuple(one for one in records if one.kind in (_Kind.WRITE, _Kind.FLUSH))
        self._last = records[-1] if records else None

    @property
    def image(self) -> Path:
        """The image that was repaired."""
        return Path(self._head.image.path)

    @property
    def bytes_kept(self) -> int:
        """How many bytes of the image it has."""
        return sum(one.old_length for one in self._done)

    def restore(self, port: WritablePort) -> None:
        """Put back all that was overwritten, and give a file the size that it had.

        If interrupted, doing it again finishes it. Nothing happens if it was done before.

        Raises:
            ChangedSinceRepair: nothing was written.
            BackupUnusable: nothing was written.
            WriteFailed, FlushFailed: the image is somewhere between the two states.
        """
        if self._left == 0:
            return
        self._require_same_file(port)
        with (
            FileReadable(self.path) as kept,
            AppendedFile.reopened(self.path, self._end) as log,
        ):
            waiting = self._still_to_undo(port, kept)
            _note_left(log, self._left)
            for number in reversed(range(self._left)):
                record = self._done[number]
                if record.kind == _Kind.FLUSH:
                    # Writes that had a flush between them may be to the same place.
                    port.flush()
                    _note_left(log, number + 1)
                elif record in waiting:
                    port.write(record.offset, _old_bytes(self.path, kept, record))
            port.flush()
            if not port.is_block_device and port.size != self._head.size:
                port.truncate_to(self._head.size)
                port.flush()
            _note_left(log, 0)

    @property
    def _left(self) -> int:
        """How many of the records, from the first one on, may still have to be undone."""
        last = self._last
        if last is not None and last.kind == _Kind.UNDO:
            return min(last.left, len(self._done))
        return len(self._done)

    @property
    def _seal(self) -> _Record | None:
        """The seal, where the undoing has not begun."""
        last = self._last
        return last if last is not None and last.kind == _Kind.SEAL else None

    def _require_same_file(self, port: WritablePort) -> None:
        image = port.name
        # Its bytes tell where nothing else does.
        if not may_be_same(identify(Path(image)), self._head.image):
            raise ChangedSinceRepair(image, "it is another file")
        smallest = self._head.size
        largest = max([smallest, *(one.offset + one.length for one in self._done)])
        seal = self._seal
        if seal is not None:
            smallest = largest = seal.size
            if _time_of_change(port) != seal.changed:
                raise ChangedSinceRepair(image, "it has been written to")
        # A repair that was interrupted may have made it larger in part.
        if not port.is_block_device and not smallest <= port.size <= largest:
            raise ChangedSinceRepair(image, f"it has {port.size} bytes")

    def _still_to_undo(self, port: WritablePort, kept: FileReadable) -> frozenset[_Record]:
        """The writes that are in the image, each checked from the last one back.

        Of a repair or an undoing that was interrupted, those of one step may not be.
        """
        complete = self._seal is not None
        undone = _Undone(self.path, port, kept)
        waiting = []
        for record in reversed(self._done[: self._left]):
            if record.kind == _Kind.FLUSH:
                continue
            # All of them are read before any is put back.
            _old_bytes(self.path, kept, record)
            found = hashlib.sha256(undone.read(record.offset, record.length)).digest()
            if found == record.new_digest:
                waiting.append(record)
            elif complete or not _is_old(undone, record):
                place = f"the {record.length} bytes at offset {record.offset:#x} are different now"
                raise ChangedSinceRepair(port.name, place)
            undone.undo(record)
        return frozenset(waiting)


def _note_left(log: AppendedFile, left: int) -> None:
    log.append(_packed_record(_Kind.UNDO, left, 0, 0, 0, b"", b""))
    log.flush()


def _is_old(image: Readable, record: _Record) -> bool:
    data = image.read(record.offset, record.length)
    old, behind = data[: record.old_length], data[record.old_length :]
    return hashlib.sha256(old).digest() == record.old_digest and not any(behind)


class _Undone:
    """The image as it is once some writes are undone."""

    def __init__(self, path: Path, image: Readable, kept: FileReadable) -> None:
        self._path, self._image, self._kept = path, image, kept
        self._undone: list[_Record] = []
        self._starts = np.zeros(0, np.int64)
        self._ends = np.zeros(0, np.int64)

    @property
    def name(self) -> str:
        return self._image.name

    @property
    def size(self) -> int:
        return self._image.size

    def undo(self, record: _Record) -> None:
        self._undone.append(record)
        if len(self._undone) > len(self._starts):
            room = max(64, 2 * len(self._starts))
            self._starts = np.resize(self._starts, room)
            self._ends = np.resize(self._ends, room)
        last = len(self._undone) - 1
        self._starts[last], self._ends[last] = record.offset, record.offset + record.length

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(self._image.read(offset, length))
        count = len(self._undone)
        touching = (self._starts[:count] < offset + length) & (self._ends[:count] > offset)
        for number in np.flatnonzero(touching).tolist():
            record = self._undone[number]
            old = _old_bytes(self._path, self._kept, record).ljust(record.length, b"\0")
            low = max(offset, record.offset)
            high = min(offset + length, record.offset + record.length)
            part = old[low - record.offset : high - record.offset]
            data[low - offset : high - offset] = part
        return bytes(data)


def _read_head(file: FileReadable) -> tuple[_Head, int]:
    start = file.read(0, _LONGEST_HEAD)
    end = start.find(b"\n", len(BACKUP_MAGIC))
    if not start.startswith(BACKUP_MAGIC) or end < 0:
        raise BackupUnusable(file.name, "it does not begin like a backup")
    try:
        head = decoded(start[len(BACKUP_MAGIC) : end], _Head)
    except UnusableState as error:
        raise BackupUnusable(file.name, str(error)) from error
    if not head.image.path.startswith("/") or "\0" in head.image.path or head.size < 0:
        raise BackupUnusable(file.name, "it does not say which image it belongs to")
    return head, end + 1


def _read_records(file: FileReadable, position: int) -> Iterator[_Record]:
    """The records, up to one that a kill has cut off: what it announces was not written."""
    step = _RECORD.size + _CHECKSUM.size
    while position + step <= file.size:
        packed = file.read(position, step)
        (checksum,) = _CHECKSUM.unpack_from(packed, _RECORD.size)
        if zlib.crc32(packed[: _RECORD.size]) != checksum:
            if not any(file.read(position, min(file.size - position, _LARGEST_WRITE))):
                # What a power cut leaves of a file that was just about to grow.
                return
            raise BackupUnusable(file.name, f"it is damaged at byte {position}")
        kind, offset, length, old_length, packed_length, new, old = _RECORD.unpack_from(packed)
        position += step
        record = _Record(
            kind=kind.decode("ascii", "replace"),
            offset=offset,
            length=length,
            old_length=old_length,
            packed_length=packed_length,
            new_digest=new,
            old_digest=old,
            packed_at=position,
        )
        if record.kind == _Kind.WRITE:
            if max(record.length, record.old_length, record.packed_length) > _LARGEST_WRITE:
                raise BackupUnusable(file.name, f"it cannot be parsed at byte {position}")
            position += record.packed_length
            if position > file.size:
                return
        yield record


def _old_bytes(path: Path, kept: FileReadable, record: _Record) -> bytes:
    packed = kept.read(record.packed_at, record.packed_length)
    try:
        old = zlib.decompressobj().decompress(packed, max(1, record.old_length))
    except zlib.error as error:
        raise BackupUnusable(str(path), f"it is damaged: {error}") from error
    if hashlib.sha256(old).digest() != record.old_digest:
        raise BackupUnusable(str(path), "a checksum in it does not match")
    return old
