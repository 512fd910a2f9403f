# SPDX-License-Identifier: Apache-2.0
"""The log that the device mapper's log-writes target leaves, and the states that it allows.

The format is in the kernel's ``Documentation/admin-guide/device-mapper/log-writes.rst`` and
``drivers/md/dm-log-writes.c``: a superblock in the first sector, then for each entry a sector
that describes it, followed by what was written. All numbers are little-endian.

A plain write enters the log when a flush that came after it has completed, in the order in
which writes completed. So "everything up to a flush" is what was durable then; of what lies
between two flushes any part may be there, in any order.
"""

from __future__ import annotations

import os
import random
import struct
from enum import IntFlag
from typing import TYPE_CHECKING, Final, Protocol

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

SECTOR: Final = 512
_MAGIC: Final = 0x6A736677736872
_VERSION: Final = 1
_SUPERBLOCK: Final = struct.Struct("<QQQI")
_ENTRY: Final = struct.Struct("<QQQQ")


class Flags(IntFlag):
    """What an entry was, beside a write."""

    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8
    METADATA = 16


class LogDamaged(AssertionError):
    """This is no log, or not all of it."""


class Entry(Struct, frozen=True):
    """One entry. *data* is empty for discards, flushes and marks, *mark* for all but marks."""

    offset: int
    length: int
    flags: Flags
    data: bytes
    mark: str

    @property
    def changes(self) -> bool:
        return self.length > 0 and not self.flags & Flags.MARK


def clear(device: Path) -> None:
    """Make a device ready for a new log."""
    with device.open("r+b", buffering=0) as log:
        log.write(bytes(4096))
        os.fsync(log.fileno())


def copy_log(device: Path, target: Path) -> None:
    """Copy the used part of a log's device, which the kernel has written to past its cache."""
    fd = os.open(device, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        end = _end_of(fd)
        with target.open("wb") as copy:
            for start in range(0, end, 1 << 20):
                copy.write(os.pread(fd, min(1 << 20, end - start), start))
    finally:
        os.close(fd)


def read_log(path: Path) -> list[Entry]:
    """All entries, in order."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return [entry for entry, _ in _entries(fd)]
    finally:
        os.close(fd)


def _end_of(fd: int) -> int:
    return max((end for _, end in _entries(fd)), default=SECTOR)


def _entries(fd: int) -> Iterator[tuple[Entry, int]]:
    magic, version, count, sector_size = _SUPERBLOCK.unpack(os.pread(fd, _SUPERBLOCK.size, 0))
    if (magic, version) != (_MAGIC, _VERSION) or sector_size < SECTOR:
        raise LogDamaged(f"magic {magic:#x}, version {version}, sectors of {sector_size} bytes")
    position = sector_size
    for _ in range(count):
        head = os.pread(fd, sector_size, position)
        if len(head) < sector_size:
            raise LogDamaged("it ends in mid-entry")
        sector, sectors, raw_flags, text_length = _ENTRY.unpack_from(head)
        flags = Flags(raw_flags)
        position += sector_size
        length = 0 if flags & Flags.DISCARD else sectors * sector_size
        data = os.pread(fd, length, position)
        if len(data) < length:
            raise LogDamaged("it ends in mid-entry")
        position += length
        text = head[_ENTRY.size : _ENTRY.size + text_length] if flags & Flags.MARK else b""
        entry = Entry(
            sector * sector_size, sectors * sector_size, flags, data, text.decode(errors="replace")
        )
        yield entry, position


class Medium(Protocol):
    """What holds the device's content."""

    def read(self, offset: int, length: int) -> bytes: ...

    def write(self, offset: int, data: bytes) -> None: ...


class State(Struct, frozen=True):
    """A moment at which the power may go.

    Attributes:
        label: how it came about.
        marks: the marks that were set by then.
        number: counts the states.
    """

    label: str
    marks: frozenset[str]
    number: int


def states(
    medium: Medium, log: Sequence[Entry], *, subsets: int, seed: int, unit: int = SECTOR
) -> Iterator[State]:
    """Put the medium, step by step, into the states in which a power cut can leave it.

    After every entry there is one. Between two flushes there are besides, *subsets* times, a
    random part of the writes, each of them entirely or any of its units of so many bytes.
    """
    choice = random.Random(seed)
    marks: frozenset[str] = frozenset()
    number = 0
    yield State("nothing written", marks, number)
    window: list[Entry] = []
    for index, entry in enumerate(log):
        window.append(entry)
        if not entry.flags & Flags.FLUSH and index + 1 < len(log):
            continue
        first = index + 1 - len(window)
        # Whatever was said to be done when a mark was set had to be durable already.
        marks_after = marks | {each.mark for each in window if each.flags & Flags.MARK}
        undo = _Undo(medium)
        for sample in range(subsets if any(each.changes for each in window) else 0):
            for each in window:
                # Without a flush, too, a write that forces unit access is there once it is done.
                is_there = each.flags & Flags.FUA and each is not entry
                part = _all_of(each) if is_there else _part_of(each, choice, unit)
                for offset, data in part:
                    undo.write(offset, data)
            number += 1
            label = f"a random part ({sample}) of entries {first} to {index}"
            yield State(label, marks_after, number)
            undo.roll_back()
        for position, each in enumerate(window, first):
            for offset, data in _all_of(each):
                medium.write(offset, data)
            if each.flags & Flags.MARK:
                marks |= {each.mark}
            number += 1
            yield State(f"entries up to {position} ({each.flags!r})", marks, number)
        window = []


class _Undo:
    """Writes to a medium that can be taken back."""

    def __init__(self, medium: Medium) -> None:
        self._medium = medium
        self._old: list[tuple[int, bytes]] = []

    def write(self, offset: int, data: bytes) -> None:
        self._old.append((offset, self._medium.read(offset, len(data))))
        self._medium.write(offset, data)

    def roll_back(self) -> None:
        while self._old:
            self._medium.write(*self._old.pop())


_DISCARD_PIECE: Final = 1 << 20


def _all_of(entry: Entry) -> Iterator[tuple[int, bytes]]:
    if not entry.changes:
        return
    if not entry.flags & Flags.DISCARD:
        yield entry.offset, entry.data
        return
    end = entry.offset + entry.length
    for start in range(entry.offset, end, _DISCARD_PIECE):
        yield start, bytes(min(_DISCARD_PIECE, end - start))


def _part_of(entry: Entry, choice: random.Random, unit: int) -> Iterator[tuple[int, bytes]]:
    """What is left of a write: all, nothing, or any of its units."""
    fate = choice.random()
    if fate < 0.3 or not entry.changes:
        return
    if fate < 0.6 or entry.flags & Flags.DISCARD:
        yield from _all_of(entry)
        return
    for start in range(0, len(entry.data), unit):
        if choice.random() < 0.5:
            yield entry.offset + start, entry.data[start : start + unit]
