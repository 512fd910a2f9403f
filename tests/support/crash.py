# SPDX-License-Identifier: Apache-2.0
"""Every state in which a crash can leave an image.

A :class:`RecordingPort` stands in for the file or device while something is written, and
keeps a log. :func:`crash_states` rebuilds from the log what the disk may hold after a power
cut at any moment: all writes before the last flush, and of those after it any subset, each
of them entirely or any of its 512-byte sectors.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from chainmerge.storage.errors import FlushFailed, NoSpaceLeft, WriteFailed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SECTOR = 512
# Up to here a window's writes are also left out, and let through, one by one.
_SINGLED_OUT = 12


@dataclass(frozen=True, slots=True)
class Written:
    """A write that was asked for."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Flushed:
    """A flush that returned: everything before it is durable."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """Space that was reserved; it changes nothing that a reader sees."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Resized:
    """The file's new size; from here on a crash may leave it or the old one."""

    size: int


@dataclass(frozen=True, slots=True)
class Punched:
    """A range that reads as zeros from here on, or after a crash as what it was."""

    offset: int
    length: int


Event = Written | Flushed | Reserved | Resized | Punched


Change = Written | Resized | Punched


class RecordingPort:
    """An image in memory, with the log of what was done to it.

    Attributes:
        name: What messages call it.
        is_block_device: Whether its size is fixed.
        content: What a reader sees now.
        log: Everything that changed it, in order.
    """

    def __init__(
        self, content: bytes, name: str = "recorded.qcow2", *, is_block_device: bool = False
    ) -> None:
        self.name = name
        self.is_block_device = is_block_device
        self.content = bytearray(content)
        self.log: list[Event] = []

    @property
    def size(self) -> int:
        return len(self.content)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.content[offset : offset + length]).ljust(length, b"\0")

    def reserve(self, offset: int, length: int) -> None:
        self.log.append(Reserved(offset, length))

    def write(self, offset: int, data: bytes) -> None:
        if self.is_block_device and offset + len(data) > len(self.content):
            raise NoSpaceLeft(self.name, offset, len(data), "end of the device")
        self.log.append(Written(offset, bytes(data)))
        _apply(self.content, offset, data)

    def truncate_to(self, size: int) -> None:
        self.log.append(Resized(size))
        _resize(self.content, size)

    def punch(self, offset: int, length: int) -> None:
        self.log.append(Punched(offset, length))
        end = min(offset + length, len(self.content))
        _apply(self.content, offset, bytes(max(0, end - offset)))

    def flush(self) -> None:
        self.log.append(Flushed())

    def forget_cached(self) -> None:
        """Nothing is cached."""


class FailingPort(RecordingPort):
    """A port whose storage dies: write or flush number *survives* is the first to fail."""

    def __init__(self, content: bytes, survives: int) -> None:
        super().__init__(content)
        self._left = survives

    def write(self, offset: int, data: bytes) -> None:
        if self._left == 0:
            raise WriteFailed(self.name, offset, len(data), "the storage is gone")
        self._left -= 1
        super().write(offset, data)

    def flush(self) -> None:
        if self._left == 0:
            raise FlushFailed(self.name, "the storage is gone")
        self._left -= 1
        super().flush()


class FullFileSystem(RecordingPort):
    """A file on a file system that has no room for anything."""

    def reserve(self, offset: int, length: int) -> None:
        raise NoSpaceLeft(self.name, offset, length, "No space left on device")

    def write(self, offset: int, data: bytes) -> None:
        raise AssertionError("written although nothing could be reserved")


@dataclass(frozen=True, slots=True)
class CrashState:
    """What the disk may hold.

    Attributes:
        content: The image.
        flushes: How many flushes had returned by then.
        label: How the state came about, for messages.
    """

    content: bytes
    flushes: int
    label: str


def crash_states(
    before: bytes, log: Sequence[Event], *, seed: int, samples: int, exhaustive: int = 0
) -> Iterator[CrashState]:
    """The states that a crash can leave: all prefixes, and samples of everything else.

    Args:
        before: The image before the first write, durable.
        log: What was written and flushed.
        seed: Of the random choices.
        samples: How many random subsets of the writes between two flushes to make.
        exhaustive: Where these writes have no more sectors together, every subset of those is
            made instead.
    """
    durable = bytearray(before)
    yield CrashState(bytes(durable), 0, "nothing written")
    choice = random.Random(seed)
    number = -1
    for number, window in enumerate(_windows(log)):
        for label, kept in _subsets(window, choice, samples, exhaustive):
            state = bytearray(durable)
            for event in kept:
                _happen(state, event)
            yield CrashState(bytes(state), number, f"after flush {number}: {label}")
        for event in window:
            _happen(durable, event)
    yield CrashState(bytes(durable), number + 1, "everything written")


def _windows(log: Sequence[Event]) -> list[list[Change]]:
    """What changes the content between each flush and the next one."""
    ends = [-1, *(at for at, event in enumerate(log) if isinstance(event, Flushed)), len(log)]
    windows = []
    for start, end in pairwise(ends):
        between = log[start + 1 : end]
        windows.append([one for one in between if isinstance(one, Written | Resized | Punched)])
    return windows if windows[-1] else windows[:-1]


def _subsets(
    window: Sequence[Change], choice: random.Random, samples: int, exhaustive: int
) -> Iterator[tuple[str, list[Change]]]:
    parts = [part for change in window for part in _parts(change)]
    if len(parts) <= exhaustive:
        for chosen in range(1, 1 << len(parts)):
            kept = [part for number, part in enumerate(parts) if chosen >> number & 1]
            yield f"of {len(parts)} sectors those in {chosen:#b}", kept
        return
    for count in range(1, len(window) + 1):
        yield f"the first {count} writes", list(window[:count])
    if len(window) <= _SINGLED_OUT:
        for number in range(len(window)):
            yield f"only write {number}", [window[number]]
            yield f"all but write {number}", [*window[:number], *window[number + 1 :]]
    for sample in range(samples):
        kept = [part for write in window for part in _survivors(write, choice)]
        yield f"random subset {sample}", kept


def _survivors(write: Change, choice: random.Random) -> list[Change]:
    """What is left of a write: all, nothing, or any of its sectors."""
    if not isinstance(write, Written):
        return [write] if choice.random() < 0.5 else []
    fate = choice.random()
    if fate < 0.3:
        return [write]
    if fate < 0.5:
        return []
    return [part for part in _sectors(write) if choice.random() < 0.5]


def _parts(change: Change) -> list[Change]:
    """What of a change a crash can leave out or let through."""
    return list(_sectors(change)) if isinstance(change, Written) else [change]


def _sectors(write: Written) -> Iterator[Written]:
    start, end = write.offset, write.offset + len(write.data)
    while start < end:
        stop = min((start // SECTOR + 1) * SECTOR, end)
        yield Written(start, write.data[start - write.offset : stop - write.offset])
        start = stop


def _happen(content: bytearray, event: Change) -> None:
    match event:
        case Written(offset, data):
            _apply(content, offset, data)
        case Resized(size):
            _resize(content, size)
        case Punched(offset, length):
            _apply(content, offset, bytes(max(0, min(length, len(content) - offset))))


def _resize(content: bytearray, size: int) -> None:
    content[size:] = bytes(max(0, size - len(content)))


def _apply(content: bytearray, offset: int, data: bytes) -> None:
    """Write into an image; a gap behind its end becomes zeros, as in a file."""
    if offset > len(content):
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data
